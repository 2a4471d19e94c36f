"""The roads to kernels, which need a GPU: that they are called as their signatures say.

Stand-ins compute what the kernels promise.
"""

import inspect
import sys
import types

import pytest
import torch
import torch.utils.checkpoint

from dgrpo.trainer.attention import dispatch as attention
from dgrpo.trainer.attention.dispatch import (
    adapt_flash,
    adapt_varlen,
    find_kernel,
    flash_kernel,
    packed_arguments,
    packed_attention,
)
from dgrpo.trainer.attention.packed import Prefixes
from tests.trainer.attention.test_dispatch import CASES, LENGTHS, Layer, call, oracle, states


def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, window, scaling, softcap=0.0, top_left=False):
    assert max_q == max(cu_q.diff().tolist()) and max_k == max(cu_k.diff().tolist())
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(k) == len(v) == cu_k[-1]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    left = window[0] if window[0] not in (None, -1) else len(k)
    outs = []
    for n in range(len(cu_q) - 1):
        queries, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        size, total = int(cu_q[n + 1] - cu_q[n]), int(cu_k[n + 1] - cu_k[n])
        i = torch.arange(size)[:, None] + (0 if top_left else total - size)
        j = torch.arange(total)
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill((j > i) | (i - j > left), float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys]))
    return torch.cat(outs)


def varlen_211(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    assert query.shape[1] == key.shape[1], "torch 2.11 has no grouped queries"
    assert window_size[1] == 0
    return stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, scale)


def varlen_213(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0
    return stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, scale)


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    assert causal
    ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return stand_in(q, k, v, *ends, window_size, softmax_scale, softcap)


def flash_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0,
):  # fmt: skip
    assert causal
    ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return stand_in(q, k, v, *ends, window_size, softmax_scale, softcap), None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", [varlen_211, varlen_213, flash_2, flash_4])
def test_kernels_get_what_they_expect(function, case, monkeypatch):
    heads, kv_heads, window, softcap = CASES[case]
    varlen = function in (varlen_211, varlen_213)
    if varlen and softcap:
        pytest.skip("varlen_attn has no soft cap: find_kernel does not choose it")
    kernel = (adapt_varlen if varlen else adapt_flash)(function)
    monkeypatch.setattr(attention, "find_kernel", lambda *_: kernel)
    inputs = states(heads, kv_heads)
    got = call(*inputs, scaling=0.4, sliding_window=window, softcap=softcap)
    torch.testing.assert_close(got, oracle(*inputs, window, softcap, 0.4), rtol=1e-9, atol=1e-9)


BRANCHES = (3, 0, 0, 0)  # the first sequence as the others' prefix


def shared(inputs, kernel, monkeypatch, **options):
    """The attention of branches by a kernel, None: by the portable form."""
    monkeypatch.setattr(attention, "find_kernel", lambda *_: kernel)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    arguments = packed_arguments(cu, LENGTHS, prefixes=Prefixes.of(LENGTHS, BRANCHES))
    return packed_attention(Layer(), *inputs, None, **arguments, **options)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", [varlen_211, varlen_213, flash_2, flash_4])
def test_kernels_get_a_prefix_with_each_branch(function, case, monkeypatch):
    heads, kv_heads, window, softcap = CASES[case]
    varlen = function in (varlen_211, varlen_213)
    if varlen and softcap:
        pytest.skip("varlen_attn has no soft cap: find_kernel does not choose it")
    inputs = states(heads, kv_heads)
    options = {"scaling": 0.4, "sliding_window": window, "softcap": softcap}
    kernel, calls = (adapt_varlen if varlen else adapt_flash)(function), []

    def counted(*args):
        calls.append(args)
        return kernel(*args)

    got = shared(inputs, counted, monkeypatch, **options)
    assert len(calls) == 2  # the trial, then this
    want = shared(inputs, None, monkeypatch, **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(want)
    got_grads = torch.autograd.grad((got * direction).sum(), inputs)
    want_grads = torch.autograd.grad((want * direction).sum(), inputs)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    shared(inputs, counted, monkeypatch, **options)
    assert len(calls) == 3  # one trial in a process


def test_a_kernel_that_aligns_otherwise_is_not_taken(monkeypatch, caplog):
    def top_left(q, k, v, cu_q, cu_k, max_q, max_k, scaling, window, softcap):
        left = -1 if window is None else window - 1
        return stand_in(q, k, v, cu_q, cu_k, max_q, max_k, (left, 0), scaling, top_left=True)

    def broken(*args):
        raise RuntimeError("no such kernel")

    inputs = states(4, 2)
    want = shared(inputs, None, monkeypatch)
    before = torch.random.get_rng_state()
    for kernel, reason in ((top_left, "relative errors"), (broken, "no such kernel")):
        caplog.clear()
        for _ in range(2):
            torch.testing.assert_close(shared(inputs, kernel, monkeypatch), want)
        (record,) = caplog.records
        assert reason in record.message and "batch.share_prompts=false" in record.message
    assert torch.equal(torch.random.get_rng_state(), before)
    monkeypatch.setattr(attention, "find_kernel", lambda *_: top_left)
    got = call(*inputs)  # sequences without a prefix still go to the kernel
    torch.testing.assert_close(got, oracle(*inputs, None, None, 8**-0.5))


def test_a_trial_leaves_activation_checkpointing_alone(monkeypatch):
    inputs = states(4, 2)
    kernel = adapt_flash(flash_2)
    want = shared(inputs, None, monkeypatch)
    want_grads = torch.autograd.grad(want.sum(), inputs)
    got = torch.utils.checkpoint.checkpoint(
        lambda *x: shared(x, kernel, monkeypatch), *inputs, use_reentrant=False
    )
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_stand_ins_have_torchs_signature():
    from torch.nn.attention.varlen import varlen_attn

    real = inspect.signature(varlen_attn).parameters
    assert set(real) >= set(inspect.signature(varlen_211).parameters)


def test_which_kernel_is_chosen(monkeypatch):
    def query(dtype=torch.bfloat16, dim=64, kind="cuda"):
        return types.SimpleNamespace(dtype=dtype, shape=(1, 4, 9, dim), device=torch.device(kind))

    monkeypatch.setattr(attention, "flash_kernel", lambda: "flash")
    monkeypatch.setattr(attention, "varlen_kernel", lambda: "varlen")
    assert find_kernel(query(), None, 0.0) == find_kernel(query(), 50.0, 0.0) == "flash"
    monkeypatch.setattr(attention, "flash_kernel", lambda: None)
    assert find_kernel(query(), None, 0.0) == "varlen"
    for portable in (
        (query(), 50.0, 0.0),
        (query(), None, 0.1),
        (query(torch.float32), None, 0.0),
        (query(dim=320), None, 0.0),
        (query(kind="cpu"), None, 0.0),
    ):
        assert find_kernel(*portable) is None


def test_flash_attention_is_found_where_it_imports(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    flash_kernel.cache_clear()
    if "flash_attn" not in sys.modules:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    try:
        assert flash_kernel() is None
        flash_kernel.cache_clear()
        module = types.ModuleType("flash_attn")
        module.flash_attn_varlen_func = flash_2
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        assert flash_kernel() is not None
    finally:
        flash_kernel.cache_clear()


def test_an_old_flash_attention_without_soft_cap_raises():
    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=None):
        raise AssertionError

    with pytest.raises(ValueError, match="softcap: this flash-attn has no soft cap"):
        adapt_flash(old)(None, None, None, None, None, 1, 1, 1.0, None, 50.0)
