"""Packing: alignment of targets and per-token values, order, limits, and errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgrpo.head import HeadInputs
from dgrpo.trainer.batch import Sample, balanced_count, filler, pack, shared_fields, split_evenly
from tests.tiny import make_groups, make_sample, make_samples


def tokens(*ids):
    return torch.tensor(ids)


def test_each_token_carries_the_target_that_its_state_predicts():
    first = Sample(tokens(10, 11, 12), tokens(20, 21), token_weights=torch.tensor([0.5, 0.25]))
    second = Sample(
        tokens(13),
        tokens(22, 23, 24),
        token_weights=torch.tensor([1.0, 2.0, 3.0]),
        loss_mask=torch.tensor([True, False, True]),
        advantages=torch.tensor([7.0, 8.0, 9.0]),
    )
    (micro,) = pack([first, second], 100)
    assert micro.input_ids.tolist() == [[10, 11, 12, 20, 13, 22, 23]]  # never the last token
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert micro.targets.tolist() == [-100, -100, 20, 21, 22, -100, 24]
    assert micro.rows.tolist() == [2, 3, 4, 6]
    assert micro.cu_seqlens.tolist() == [0, 4, 7] and micro.cu_seqlens.dtype == torch.int32
    assert micro.lengths == (4, 3)
    assert micro.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert micro.context.token_weights.tolist() == [0, 0, 0.5, 0.25, 1, 2, 3]
    assert micro.context.advantages.tolist() == [0, 0, 0, 0, 7, 8, 9]
    assert micro.spans == [(2, 2), (4, 3)]
    values = torch.arange(7.0)
    pieces = [(i, v.tolist()) for i, v in micro.per_sample(values)]
    assert pieces == [(0, [2, 3]), (1, [4, 5, 6])]


def test_per_token_fields_reach_the_context():
    samples = make_samples([(2, 3), (4, 2)], ref_logprobs=None)
    for sample in samples:
        sample.ref_logprobs = sample.old_logprobs - 1
    (micro,) = pack(samples, 100, clip_low=0.3, ref_coef=0.1)
    context = micro.context
    for index, value in micro.per_sample(context.old_logprobs):
        assert torch.equal(value, samples[index].old_logprobs)
    for index, value in micro.per_sample(context.ref_logprobs):
        assert torch.equal(value, samples[index].ref_logprobs)
    assert (context.clip_low, context.ref_coef) == (0.3, 0.1)
    assert context.sampler_logprobs is None and context.teacher_coef == 0.5


def test_a_coefficient_of_some_samples_leaves_the_others_theirs():
    samples = make_samples([(2, 3), (4, 2)])
    samples[1].teacher_coef = torch.tensor([0.9, 0.8])
    (micro,) = pack(samples, 100, teacher_coef=0.25)
    got = dict(micro.per_sample(micro.context.teacher_coef))
    assert got[0].tolist() == [0.25] * 3
    torch.testing.assert_close(got[1], torch.tensor([0.9, 0.8]))


def test_rows_of_the_teacher_follow_their_tokens():
    samples = make_samples([(2, 3), (4, 2)])
    samples[0].teacher_rows = torch.tensor([5, -1, 6])
    (micro,) = pack(samples, 100)
    assert micro.teacher_rows.tolist() == [-1, 5, -1, 6, -1, -1, -1, -1, -1]


def test_the_teachers_view_has_its_prompt_and_its_tokens():
    sample = make_sample(5, 4, 0, loss_mask=torch.tensor([True, True, False, True]))
    sample.teacher_mask = torch.tensor([True, False, True, True])
    sample.teacher_prompt_ids = tokens(3, 4)
    sample.group = 3
    seen = sample.seen_by_teacher()
    assert seen.prompt_ids.tolist() == [3, 4] and seen.group == 3
    assert torch.equal(seen.completion_ids, sample.completion_ids)
    assert seen.mask.tolist() == [True, False, False, True]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=25),
    st.integers(1, 70),
)
def test_every_sample_is_packed_once_and_no_micro_is_too_long(sizes, limit):
    samples = make_samples(sizes)
    micros = pack(samples, limit)
    assert sorted(i for micro in micros for i in micro.indices) == list(range(len(sizes)))
    for micro in micros:
        total = sum(micro.lengths)
        assert total == micro.input_ids.numel() == micro.targets.numel()
        assert total <= limit or len(micro.samples) == 1
        assert list(micro.indices) == sorted(micro.indices)
    # First fit: two micros that are half empty would have been one.
    halves = [micro for micro in micros if sum(micro.lengths) * 2 <= limit]
    assert len(halves) <= 1
    again = pack(samples, limit)
    assert [m.indices for m in again] == [m.indices for m in micros]


def test_a_prompt_is_laid_out_once_for_its_completions():
    ones = {"loss_mask": torch.tensor([True, False, True])}
    samples = [
        Sample(tokens(10, 11, 12), tokens(20, 21), group=4, index=0),
        Sample(tokens(13), tokens(22), group=5),
        Sample(tokens(10, 11, 12), tokens(23, 24, 25), group=4, index=1, **ones),
        Sample(tokens(10, 11, 12), tokens(26), group=4, index=2),
    ]
    for n, sample in enumerate(samples):
        sample.teacher_rows = 10 * n + torch.arange(len(sample.completion_ids))
    (micro,) = pack(samples, 100)
    assert micro.input_ids.tolist() == [[10, 11, 12, 20, 12, 23, 24, 12, 13]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 2, 0]]
    assert micro.lengths == (2, 2, 3, 1, 1) and micro.cu_seqlens.tolist() == [0, 2, 4, 7, 8, 9]
    assert micro.sequence_ids.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 4]
    assert micro.targets.tolist() == [-100, -100, 20, 21, 23, -100, 25, 26, 22]
    assert micro.rows.tolist() == [2, 3, 4, 6, 7, 8]
    assert micro.teacher_rows.tolist() == [-1, -1, 0, 1, 20, 21, 22, 30, 10]
    assert micro.prefixes.branches == (3, 0, 0, 0, 0)
    assert micro.prefixes.cu_seqlens_k.tolist() == [0, 2, 6, 11, 14, 15]
    assert micro.indices == (0, 2, 3, 1) and micro.spans == [(2, 2), (4, 3), (7, 1), (8, 1)]
    pieces = [(i, v.tolist()) for i, v in micro.per_sample(torch.arange(9.0))]
    assert pieces == [(0, [2, 3]), (2, [4, 5, 6]), (3, [7]), (1, [8])]
    assert micro.to("meta").prefixes.starts.is_meta


def test_only_equal_prompts_of_a_group_are_shared():
    prompt, other = tokens(10, 11), tokens(10, 12)
    samples = [Sample(p, tokens(20), group=g) for p, g in ((prompt, 0), (prompt, 1), (other, 0))]
    (micro,) = pack(samples, 100)
    assert micro.prefixes is None and micro.lengths == (2, 2, 2)
    (micro,) = pack([samples[0], Sample(prompt, tokens(21))], 100)
    assert micro.prefixes.branches == (2, 0, 0)
    (apart,) = pack([samples[0], Sample(prompt, tokens(21))], 100, share_prompts=False)
    assert apart.prefixes is None and apart.lengths == (2, 2)
    (short,) = pack([Sample(tokens(10), tokens(20, 21)), Sample(tokens(10), tokens(22))], 100)
    assert short.prefixes is None and short.lengths == (2, 1)  # its prefix has no token


def test_what_a_shared_prompt_has_of_a_micro():
    samples = make_groups([(11, (5, 4, 4, 3))])  # prefix of 10
    sizes = {26: [(0, 1, 2, 3)], 25: [(0, 1, 2), (3,)], 19: [(0, 1), (2, 3)], 18: [(0, 3), (1, 2)]}
    for limit, want in sizes.items():
        assert [micro.indices for micro in pack(samples, limit)] == want
    for limit in (14, 10, 1):  # not even two of them fit
        micros = pack(samples, limit)
        assert [micro.indices for micro in micros] == [(0,), (1,), (2,), (3,)]
        assert all(micro.prefixes is None for micro in micros)


lengths_of_groups = st.tuples(
    st.integers(1, 30), st.lists(st.integers(1, 12), min_size=1, max_size=6)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(lengths_of_groups, min_size=1, max_size=6), st.integers(1, 70))
def test_shared_prompts_in_any_sizes(groups, limit):
    samples = make_groups(groups)
    micros = pack(samples, limit)
    assert sorted(i for micro in micros for i in micro.indices) == list(range(len(samples)))
    for micro in micros:
        assert sum(micro.lengths) == micro.input_ids.numel() == micro.targets.numel()
        assert sum(micro.lengths) <= limit or len(micro.samples) == 1
        for sample, (start, count) in zip(micro.samples, micro.spans, strict=True):
            assert micro.input_ids[0, start] == sample.prompt_ids[-1]
            assert micro.position_ids[0, start] == len(sample.prompt_ids) - 1
            place = slice(start, start + count)
            assert torch.equal(
                micro.targets[place][sample.mask], sample.completion_ids[sample.mask]
            )
            assert len(micro.sequence_ids[place].unique()) == 1
            assert torch.equal(micro.context.advantages[place], sample.advantages)
    together = sum(sum(micro.lengths) for micro in micros)
    assert together <= sum(sample.length for sample in samples)
    again = pack(samples, limit)
    assert [m.indices for m in again] == [m.indices for m in micros]


def test_costs_are_split_evenly():
    parts = split_evenly([9, 1, 1, 1, 5, 4, 3], 2)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert [sum([9, 1, 1, 1, 5, 4, 3][i] for i in part) for part in parts] == [12, 12]
    assert split_evenly([2, 2], 3) == [[0], [1], []]
    with pytest.raises(ValueError, match="parts: got 0"):
        split_evenly([1], 0)


def test_a_filler_has_one_masked_token_and_the_same_fields():
    samples = make_samples([(2, 3)])
    micro = filler(shared_fields(samples), clip_low=0.1)
    assert micro.input_ids.shape == (1, 1) and len(micro.rows) == 0
    assert micro.targets.tolist() == [-100] and micro.teacher_rows.tolist() == [-1]
    assert micro.samples == () and micro.per_sample(torch.zeros(1)) == []
    assert micro.context.old_logprobs is not None and micro.context.ref_logprobs is None
    assert micro.context.clip_low == 0.1 and micro.cu_seqlens.tolist() == [0, 1]


def test_one_process_needs_no_filler():
    micros = pack(make_samples([(2, 3), (4, 2)]), 5)
    assert balanced_count(micros) is micros


def test_moving_leaves_the_samples():
    (micro,) = pack(make_samples([(2, 3)]), 9)
    moved = micro.to("meta")
    for name in ("input_ids", "position_ids", "cu_seqlens", "targets", "rows", "teacher_rows"):
        assert getattr(moved, name).is_meta
    assert moved.context.advantages.is_meta and not moved.samples[0].prompt_ids.is_meta


def test_what_the_head_gets():
    (micro,) = pack(make_samples([(2, 3)]), 9)
    inputs = micro.head_inputs("stats", options={"temperature": 0.7})
    assert isinstance(inputs, HeadInputs) and inputs.mode == "stats"
    assert inputs.rows is micro.rows and inputs.options == {"temperature": 0.7}
    names = {"input_ids", "position_ids", "cu_seqlens", "lengths", "prefixes"}
    assert micro.model_args().keys() == names


def test_a_loss_without_weights_raises():
    (micro,) = pack(make_samples([(2, 3)], token_weights=None), 9)
    assert micro.head_inputs("logprobs").context is None
    with pytest.raises(ValueError, match="token_weights: got None in a sample"):
        micro.head_inputs("loss")


def test_bad_samples_raise():
    with pytest.raises(ValueError, match=r"prompt_ids: got shape \(0,\)"):
        Sample(tokens().long(), tokens(1))
    with pytest.raises(ValueError, match=r"completion_ids: got shape \(1, 1\)"):
        Sample(tokens(1), tokens(1)[None])
    with pytest.raises(ValueError, match=r"advantages: got shape \(3,\), expected \(2,\)"):
        Sample(tokens(1), tokens(1, 2), advantages=torch.zeros(3))


def test_bad_packing_raises():
    samples = make_samples([(2, 3), (4, 2)])
    with pytest.raises(ValueError, match="max_tokens: got 0, expected at least 1"):
        pack(samples, 0)
    with pytest.raises(TypeError, match="beta"):
        pack(samples, 9, beta=0.5)
    samples[0].old_logprobs = None
    with pytest.raises(ValueError, match="old_logprobs: got it for 1 of 2 samples"):
        pack(samples, 9)
    with pytest.raises(ValueError, match="values: got 3 elements, expected 5"):
        pack(make_samples([(3, 3)]), 9)[0].per_sample(torch.zeros(3))
    assert pack([], 9) == []
