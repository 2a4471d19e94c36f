"""A packed micro-batch: what the head gets of it, and moving it."""

import pytest

from dgrpo.head import HeadInputs
from dgrpo.ops import Options
from dgrpo.trainer.batch import pack
from tests.tiny import make_samples


def test_moving_leaves_the_samples():
    (micro,) = pack(make_samples([(2, 3)]), 9)
    moved = micro.to("meta")
    for name in ("input_ids", "position_ids", "cu_seqlens", "targets", "rows", "teacher_rows"):
        assert getattr(moved, name).is_meta
    assert moved.context.advantages.is_meta and not moved.samples[0].prompt_ids.is_meta


def test_what_the_head_gets():
    (micro,) = pack(make_samples([(2, 3)]), 9)
    inputs = micro.head_inputs("stats", options=Options(temperature=0.7))
    assert isinstance(inputs, HeadInputs) and inputs.mode == "stats"
    assert inputs.options.rows is micro.rows and inputs.options.temperature == 0.7


def test_a_loss_without_weights_raises():
    (micro,) = pack(make_samples([(2, 3)], token_weights=None), 9)
    assert micro.head_inputs("logprobs").context is None
    with pytest.raises(ValueError, match="token_weights: got None in a sample"):
        micro.head_inputs("loss")
