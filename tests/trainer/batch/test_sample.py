"""A sample as a checkpoint holds it, and bad ones."""

import pytest
import torch

from dgrpo.trainer.batch import Origin, Sample, Sampled, Scored
from dgrpo.trainer.checkpoint.state import decode, encode
from tests.tiny import make_sample

LOGPROBS = torch.tensor([-0.1, -2.5])
ROW = {"source": "rows.jsonl", "id": 7}


def tokens(*ids):
    return torch.tensor(ids)


def sample(**fields):
    return Sample(tokens(1, 2), tokens(3, 4), group=5, index=1, old_logprobs=LOGPROBS, **fields)


def full():
    return sample(
        teacher_factor=0.1,
        topk=(torch.tensor([[3], [4]]), torch.zeros(2, 1)),
        origin=Origin(**ROW),
        sampled=Sampled(LOGPROBS, truncated=True),
        scored=Scored(1 / 3, {"exact": 1 / 3, "other": float("nan")}, failed=False),
    )


def restored(state):
    """The sample from a checkpoint's file."""
    return Sample.restore(tokens(1, 2), decode(*encode(state)))


@pytest.mark.parametrize("make", [full, sample])
def test_a_checkpoint_gives_it_back_to_the_bit(make):
    want = make()
    got = restored(want.state())
    (text, tensors), (want_text, others) = (encode(s.state()) for s in (got, want))
    assert text == want_text and tensors.keys() == others.keys() and tensors
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name])
    for name in ("origin", "sampled", "scored"):
        assert type(getattr(got, name)) is type(getattr(want, name))
    assert torch.equal(got.prompt_ids, want.prompt_ids)


def test_the_teachers_view_has_its_prompt_and_its_tokens():
    sample = make_sample(5, 4, 0, loss_mask=torch.tensor([True, True, False, True]))
    sample.teacher_mask = torch.tensor([True, False, True, True])
    sample.teacher_prompt_ids = tokens(3, 4)
    sample.group = 3
    seen = sample.seen_by_teacher()
    assert seen.prompt_ids.tolist() == [3, 4] and seen.group == 3
    assert torch.equal(seen.completion_ids, sample.completion_ids)
    assert seen.mask.tolist() == [True, False, False, True]


def test_bad_samples_raise():
    with pytest.raises(ValueError, match=r"prompt_ids: got shape \(0,\)"):
        Sample(tokens().long(), tokens(1))
    with pytest.raises(ValueError, match=r"completion_ids: got shape \(1, 1\)"):
        Sample(tokens(1), tokens(1)[None])
    with pytest.raises(ValueError, match=r"advantages: got shape \(3,\), expected \(2,\)"):
        Sample(tokens(1), tokens(1, 2), advantages=torch.zeros(3))
