"""Sequences that share a prefix, against each branch written out with its prefix."""

import pytest
import torch

from dgrpo.trainer.attention import packed
from dgrpo.trainer.attention.packed import Prefixes, sequences_attention
from tests.trainer.attention.test_dispatch import CASES, states

LENGTHS = (7, 3, 1, 9, 5, 4, 2, 6)
BRANCHES = (3, 0, 0, 0, 0, 2, 0, 0)  # a prefix of three, a sequence alone, a prefix of two
PREFIX = (None, 0, 0, 0, None, None, 5, 5)  # of each sequence
TOTAL = sum(LENGTHS)


def written_out(q, k, v, window, softcap, scaling):
    """(1, heads, T, D), one sequence at a time behind its prefix."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    place = torch.arange(TOTAL).split(LENGTHS)
    outs = []
    for own, prefix in zip(place, PREFIX, strict=True):
        seen = own if prefix is None else torch.cat([place[prefix], own])
        i = torch.arange(len(seen) - len(own), len(seen))[:, None]
        j = torch.arange(len(seen))
        mask = (j <= i) & (i - j < (window or TOTAL))
        scores = q[:, :, own] @ k[:, :, seen].transpose(-1, -2) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        outs.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[:, :, seen])
    return torch.cat(outs, 2)


@pytest.mark.parametrize("block", [2, 4, 1024])  # queries at once: within and across branches
@pytest.mark.parametrize("case", CASES)
def test_branches_see_their_prefix_and_themselves(case, block, monkeypatch):
    monkeypatch.setattr(packed, "QUERY_BLOCK", block)
    heads, kv_heads, window, softcap = CASES[case]
    inputs = states(heads, kv_heads, TOTAL)
    prefixes = Prefixes.of(LENGTHS, BRANCHES)
    got = sequences_attention(*inputs, LENGTHS, 0.4, window, softcap, prefixes=prefixes)
    want = written_out(*inputs, window, softcap, 0.4)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(want)
    got_grads = torch.autograd.grad((got * direction).sum(), inputs)
    want_grads = torch.autograd.grad((want * direction).sum(), inputs)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_what_each_sequence_sees():
    prefixes = Prefixes.of((3, 2, 1, 4, 2), (2, 0, 0, 0, 0))
    assert prefixes.order == (0, 0, 1, 0, 2, 3, 4)
    assert prefixes.cu_seqlens_k.tolist() == [0, 3, 8, 12, 16, 18]
    assert prefixes.cu_seqlens_k.dtype == torch.int32 and prefixes.longest_k == 5
    assert prefixes.starts.tolist() == [0, 0, 0, 3, 3, 5, 6, 6, 6, 6, 10, 10]
    keys = prefixes.expand(torch.arange(12), (3, 2, 1, 4, 2)).tolist()
    assert keys == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    assert prefixes.to("meta").starts.is_meta and prefixes.to("meta").cu_seqlens_k.is_meta


def test_two_prefixes_in_a_row():
    prefixes = Prefixes.of((3, 1, 2, 4, 1), (1, 0, 2, 0, 0))
    assert prefixes.order == (0, 0, 1, 2, 2, 3, 2, 4)
    assert prefixes.cu_seqlens_k.tolist() == [0, 3, 7, 9, 15, 18]


def test_dropout_drops_in_branches():
    inputs = states(2, 2, TOTAL)
    options = {"scaling": 0.4, "prefixes": Prefixes.of(LENGTHS, BRANCHES)}
    whole = sequences_attention(*inputs, LENGTHS, **options)
    dropped = sequences_attention(*inputs, LENGTHS, dropout=0.5, **options)
    assert not torch.allclose(whole[:, :, 7:20], dropped[:, :, 7:20])
