"""Packed attention against one sequence at a time with explicit masks, for every kind of model."""

import pytest
import torch

from dgrpo.trainer.attention import packed
from dgrpo.trainer.attention.dispatch import (
    packed_arguments,
    packed_attention,
    use_packed_attention,
)
from dgrpo.trainer.batch import pack
from tests.tiny import SIZES, make_samples, plain_logits, tiny_model, tiny_pair

LENGTHS = (7, 1, 33, 12)
TOTAL = sum(LENGTHS)
CASES = {  # heads, kv_heads, window, softcap
    "plain": (4, 4, None, None),
    "grouped": (4, 2, None, None),
    "window": (4, 1, 5, None),
    "window_of_one": (2, 2, 1, None),
    "softcap": (4, 2, None, 0.7),
    "window_and_softcap": (4, 2, 5, 0.7),
    "window_longer_than_all": (4, 2, 64, None),
}


class Layer(torch.nn.Module):
    """Stands for an attention layer."""


def states(heads, kv_heads, tokens=TOTAL, dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(1, h, tokens, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def call(q, k, v, lengths=LENGTHS, **options):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return packed_attention(Layer(), q, k, v, None, **packed_arguments(cu, lengths), **options)[0]


def oracle(q, k, v, window, softcap, scaling):
    """(1, T, heads, D) from one mask over all packed tokens."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    i = torch.arange(len(owner))
    seen = (owner[:, None] == owner) & (i[:, None] >= i)
    if window:
        seen &= i[:, None] - i < window
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, v)


@pytest.mark.parametrize("block", [4, 1024])  # queries at once: sequences longer and shorter
@pytest.mark.parametrize("case", CASES)
def test_sequences_do_not_see_each_other(case, block, monkeypatch):
    monkeypatch.setattr(packed, "QUERY_BLOCK", block)
    heads, kv_heads, window, softcap = CASES[case]
    inputs = states(heads, kv_heads)
    got = call(*inputs, scaling=0.4, sliding_window=window, softcap=softcap)
    want = oracle(*inputs, window, softcap, 0.4)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(want)
    got_grads = torch.autograd.grad((got * direction).sum(), inputs)
    want_grads = torch.autograd.grad((want * direction).sum(), inputs)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_scaling_defaults_to_the_root_of_the_width():
    inputs = states(2, 2)
    torch.testing.assert_close(call(*inputs), call(*inputs, scaling=8**-0.5))


def test_lengths_are_read_from_cu_seqlens_where_they_are_absent():
    inputs = states(2, 2)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    got, _ = packed_attention(Layer(), *inputs, None, cu_seq_lens_q=cu, max_length_q=33)
    torch.testing.assert_close(got, call(*inputs))


def test_dropout_drops():
    inputs = states(2, 2)
    torch.manual_seed(1)
    for softcap in (None, 0.7):
        dropped = call(*inputs, dropout=0.5, softcap=softcap)
        assert not torch.allclose(dropped, call(*inputs, softcap=softcap))


# Whole models: every layer type of a model at once, past its sliding window.
@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "mistral_window", "gemma2", "gemma3", "cohere2", "qwen3_moe"]
)
def test_packed_models_equal_unpacked_ones(kind):
    policy, plain = tiny_pair(kind)
    samples = make_samples(SIZES)  # up to 20 tokens, the window is 6
    micros = pack(samples, 25)
    assert max(len(micro.samples) for micro in micros) > 1
    for micro in micros:
        logits = policy.head(policy.hidden_states(micro))
        for sample, (start, tokens) in zip(micro.samples, micro.spans, strict=True):
            got = logits[start : start + tokens]
            scale = policy.head.logit_scale
            want = plain_logits(plain, sample)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * max(1.0, scale))


def test_the_window_matters_in_these_sizes():
    wide, narrow = (tiny_model("gemma3", sliding_window=w) for w in (64, 6))
    (sample,) = make_samples([(12, 9)])
    assert not torch.allclose(plain_logits(wide, sample), plain_logits(narrow, sample), atol=1e-4)


def test_a_cache_takes_the_call_over():
    class Cache:
        def attend(self, module, query, key, value, mask, **options):
            self.got = options
            return "mine"

    cache, inputs = Cache(), states(2, 2)
    arguments = packed_arguments(None, None, cache)
    options = {"scaling": 0.3, "sliding_window": 4, "softcap": None}
    assert packed_attention(Layer(), *inputs, None, **options, **arguments) == "mine"
    assert cache.got.items() >= options.items() and cache.got["cu_seq_lens_q"] is None


def test_what_it_cannot_do_raises():
    q, k, v = states(2, 2)
    with pytest.raises(RuntimeError, match="Layer did not receive cu_seq_lens_q"):
        packed_attention(Layer(), q, k, v, None)
    with pytest.raises(ValueError, match="s_aux: got attention sinks"):
        call(q, k, v, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="is_causal: got False"):
        call(q, k, v, is_causal=False)
    with pytest.raises(ValueError, match="input_ids: got 2 rows, expected 1"):
        call(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)))


def test_models_outside_of_the_attention_interface_raise():
    import transformers

    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="model: got BloomForCausalLM"):
        use_packed_attention(model)
