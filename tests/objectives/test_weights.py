"""Token weights against explicit loops over sequences, and their independence of the split."""

import pytest
import torch

from dgrpo.objectives import BatchCounts, batch_counts, padded_sequence_ids, token_weights

KINDS = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant", "bnpo": "local"}
MAX_LENGTH = 20


def ragged(seed=0, rows=6, width=9):
    """A random (B, T) mask with one row of a single token and one without any."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=generator) < 0.6
    mask[1] = False
    mask[2] = False
    mask[2, 3] = True
    return mask


def losses_like(mask, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mask.shape, dtype=torch.float64, generator=generator)


def by_hand(losses, mask, kind):
    """The published reductions, written as loops over sequences."""
    sequences = [row[kept] for row, kept in zip(losses, mask, strict=True) if kept.any()]
    total = sum(row.sum() for row in sequences)
    if kind == "grpo":
        return sum(row.mean() for row in sequences) / len(sequences)
    if kind == "dr_grpo":
        return total / (MAX_LENGTH * len(sequences))
    return total / sum(len(row) for row in sequences)


def weights(mask, kind, **kwargs):
    return token_weights(mask, kind, max_length=MAX_LENGTH, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_is_reduced_as_published(kind):
    mask = ragged()
    losses = losses_like(mask)
    got = weights(mask, kind)
    torch.testing.assert_close((got * losses).sum(), by_hand(losses, mask, kind))
    assert got.shape == mask.shape and (got[~mask] == 0).all() and (got[mask] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded_agree(kind):
    mask = ragged(2)
    packed = mask.reshape(-1)
    ids = torch.arange(6).repeat_interleave(9)  # prompts and padding keep their sequence's id
    want = weights(mask, kind).reshape(-1)
    for numbers in (ids, padded_sequence_ids(mask), 5 - ids):
        assert torch.equal(weights(packed, kind, sequence_ids=numbers), want)
    assert torch.equal(weights(mask.int(), kind).reshape(-1), want)


@pytest.mark.parametrize("paper, name", KINDS.items())
def test_a_kind_has_two_names(paper, name):
    assert torch.equal(weights(ragged(), paper), weights(ragged(), name))


def split(mask, losses, ranks, seed):
    """Sequences dealt to ranks and micro-batches at random: (mask, losses) by [rank][micro]."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(ranks, (len(mask),), generator=generator)
    owner[:ranks] = torch.arange(ranks)  # nobody without a sequence
    parts = []
    for rank in range(ranks):
        mine = (owner == rank).nonzero()[:, 0]
        parts.append([(mask[rows], losses[rows]) for rows in mine.split(1 + rank % 2)])
    return parts


def counted_together(parts):
    """What `all_reduce` gives each rank: every rank's own counts, summed."""
    alone = [batch_counts([mask for mask, _ in micros]) for micros in parts]
    total = torch.stack([torch.stack(list(counts)) for counts in alone]).sum(0)
    return [
        batch_counts([mask for mask, _ in micros], all_reduce=lambda counts: counts.copy_(total))
        for micros in parts
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_the_split_over_ranks_and_micro_batches_does_not_matter(kind, ranks):
    mask = ragged(3, rows=9)
    losses = losses_like(mask)
    parts = split(mask, losses, ranks, seed=ranks)
    assert sum(map(len, parts)) > ranks
    by_rank = [
        sum((weights(m, kind, counts=counts, world_size=ranks) * x).sum() for m, x in micros)
        for micros, counts in zip(parts, counted_together(parts), strict=True)
    ]
    averaged = sum(by_rank) / ranks  # as FSDP does with gradients
    torch.testing.assert_close(averaged, by_hand(losses, mask, kind))


def test_bnpo_is_the_mean_of_the_micro_batches_means():
    mask = ragged(4, rows=9)
    parts = split(mask, losses_like(mask), ranks=2, seed=0)
    by_rank = [
        sum((weights(m, "bnpo", counts=counts, world_size=2) * x).sum() for m, x in micros)
        for micros, counts in zip(parts, counted_together(parts), strict=True)
    ]
    means = [
        x[m].mean() if m.any() else torch.zeros((), dtype=torch.float64)
        for micros in parts
        for m, x in micros
    ]
    torch.testing.assert_close(sum(by_rank) / 2, sum(means) / len(means))


def test_counts():
    mask = ragged()
    counts = batch_counts([mask, mask[:3]])
    assert [int(n) for n in counts] == [int(mask.sum() + mask[:3].sum()), 5 + 2, 2]
    packed = batch_counts([mask.reshape(-1)], [torch.arange(6).repeat_interleave(9)])
    assert [int(n) for n in packed] == [int(mask.sum()), 5, 1]
    assert all(n.dtype == torch.int64 and not n.dim() for n in packed)
    assert [int(n) for n in batch_counts([])] == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_counts_may_be_numbers(kind):
    mask = ragged()
    numbers = BatchCounts(*(int(n) for n in batch_counts([mask])))
    assert torch.equal(weights(mask, kind, counts=numbers), weights(mask, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_tokens_has_no_weight(kind):
    mask = torch.zeros(3, 4, dtype=torch.bool)
    assert (weights(mask, kind) == 0).all()
    assert weights(mask[:, :0], kind).shape == (3, 0)


def test_large_counts_keep_their_precision():
    """Tokens times sequences pass 2^24, where fp32 stops counting."""
    counts = BatchCounts(tokens=2**24 + 1, sequences=2**20 + 1)
    mask = torch.ones(1, 3, dtype=torch.bool)
    got = token_weights(mask, "dr_grpo", counts=counts, max_length=1001, dtype=torch.float64)
    assert got[0, 0].item() == 1 / ((2**20 + 1) * 1001)
    assert token_weights(mask, "token", counts=counts).dtype == torch.float32


@pytest.mark.parametrize(
    "mask, kwargs, message",
    [
        (torch.ones(2, 3), {"kind": "ppo"}, 'kind: got \'ppo\', expected one of "grpo"/"sequence"'),
        (torch.ones(2, 3), {"kind": "dr_grpo"}, "max_length: got None, expected a positive"),
        (torch.ones(2, 3), {"kind": "dr_grpo", "max_length": -1}, "max_length: got -1, expected"),
        (torch.ones(3), {"kind": "grpo"}, r"sequence_ids: got None.*shape \(3,\)"),
        (torch.ones(3), {"kind": "dr_grpo", "max_length": 4}, "sequence_ids: got None"),
        (torch.ones(2, 3, 4), {"kind": "token"}, r"mask: got shape \(2, 3, 4\), expected \(N,\)"),
        (
            torch.ones(2, 3),
            {"kind": "token", "world_size": 2},
            "counts: got None with world_size=2",
        ),
        (
            torch.ones(3),
            {"kind": "grpo", "sequence_ids": torch.zeros(2, dtype=torch.int64)},
            r"sequence_ids: got shape \(2,\) for values of shape \(3,\)",
        ),
        (
            torch.ones(3),
            {"kind": "grpo", "sequence_ids": torch.tensor([7, 7, 8])},
            "sequence_ids: got values from 7 to 8, expected -1 … 2",
        ),
    ],
)
def test_errors_say_what_to_pass(mask, kwargs, message):
    with pytest.raises(ValueError, match=message):
        token_weights(mask, **kwargs)


def test_more_errors():
    with pytest.raises(TypeError, match="sequence_ids: got dtype torch.float32"):
        token_weights(torch.ones(3), "grpo", sequence_ids=torch.zeros(3))
    with pytest.raises(ValueError, match="sequence_ids: got None for a mask"):
        batch_counts([torch.ones(3)])
    with pytest.raises(ValueError, match=r"mask: got shape \(3,\), expected \(B, T\)"):
        padded_sequence_ids(torch.ones(3))
