"""Large sizes on a GPU: 64-bit offsets, 131072 tokens, and the memory contract."""

import gc

import pytest
import torch

import dgrpo
from tests.gpu.device import DEVICE, MIB, gpu_tests, on_gpu
from tests.ops.cases import (
    assert_near,
    gradients,
)

pytestmark = gpu_tests


@on_gpu
@pytest.mark.parametrize("kind", ["full", "topk"])
def test_logits_of_more_than_two_to_the_31(kind):
    """N·V over 2^31, in one block of G where there is room; its last rows against those alone."""
    tokens, vocab = 16384, 152064
    assert tokens * vocab > 2**31
    case = big_case(tokens, vocab, 64)
    teacher = teacher_head(case) if kind == "full" else top_teacher(tokens, vocab)
    budget = 24 * 2**30 if torch.cuda.mem_get_info()[0] > 40 * 2**30 else 2**30
    got = dgrpo.linear_dgrpo_loss(*case, teacher=teacher, memory_budget=budget)
    d_hidden = gradients(got.loss, case[0])[0]
    last = slice(tokens - 64, tokens)
    part = [x[last].detach() for x in (case[0], case[2], case[3])]
    part[0].requires_grad_()
    fields = {"token_weights": torch.full((64,), 1 / tokens, device=DEVICE)}
    if kind == "full":
        own = dgrpo.TeacherHead(teacher.hidden[last], teacher.weight)
    else:
        own = dgrpo.TopKTeacher(teacher.token_ids[last], teacher.logprobs[last])
    want = dgrpo.linear_dgrpo_loss(part[0], case[1], *part[1:], teacher=own, **fields)
    assert_near(got.logprobs[last], want.logprobs, 1e-5, "logprobs")
    assert_near(got.divergence[last], want.divergence, 1e-4, "divergence")
    assert_near(d_hidden[last], gradients(want.loss, part[0])[0], 5e-3, "d_hidden")


@on_gpu
def test_row_offsets_beyond_32_bits_in_the_kernels():
    """One block of bf16 gradients and fp32 logits with 2^31 elements before its last rows."""
    from dgrpo_kernels import STATS, Logits
    from dgrpo_kernels import triton_rows as kernels

    rows, stride = 3, 2**30
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 14 GiB")
    draw = torch.randn(rows, 100, device=DEVICE)
    far = torch.empty(2 * stride + 128, device=DEVICE).as_strided((rows, 100), (stride, 1))
    out = torch.empty(2 * stride + 128, device=DEVICE, dtype=torch.bfloat16)
    out = out.as_strided((rows, 100), (stride, 1))
    far.copy_(draw)
    targets = torch.tensor([1, 2, 3], device=DEVICE)
    stats, coef = torch.zeros(STATS, rows, device=DEVICE), torch.ones(3, rows, device=DEVICE)
    kernels.row_stats(Logits(far), None, targets, stats, divergence="none")
    log_p = draw.double().log_softmax(-1)
    assert_near(stats[4], log_p.gather(1, targets[:, None])[:, 0], 1e-5, "logprobs")
    kernels.row_grad(Logits(far), None, targets, stats, coef, out, divergence="none")
    p, entropy = log_p.exp(), -(log_p.exp() * log_p).sum(-1, keepdim=True)
    want = torch.nn.functional.one_hot(targets, 100) - p - p * (log_p + entropy)
    assert_near(out.float(), want, 5e-3, "gradient")


def big_case(tokens, vocab, width, dtype=torch.bfloat16):
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE, generator=generator)
    weight = torch.randn(vocab, width, device=DEVICE, generator=generator) / 4
    targets = torch.randint(vocab, (tokens,), device=DEVICE, generator=generator)
    advantages = torch.randn(tokens, device=DEVICE, generator=generator)
    leaves = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    return (*leaves, targets, advantages)


def teacher_head(case):
    return dgrpo.TeacherHead(case[0].detach() * 0.9, case[1].detach())


def top_teacher(tokens, vocab):
    ids = (
        torch.arange(8, device=DEVICE) * (vocab // 9) + torch.arange(tokens, device=DEVICE)[:, None]
    )
    return dgrpo.TopKTeacher(ids % vocab, torch.full((tokens, 8), -3.0, device=DEVICE))


@on_gpu
def test_131072_tokens_keep_the_memory_contract():
    """Budget + dHidden + dW in fp32 + dW in bf16 + workspace; backward one scaled copy more."""
    tokens, vocab, width, budget = 131072, 152064, 256, 2**30
    case = big_case(tokens, vocab, width)
    teacher = teacher_head(case)
    rows = torch.arange(0, tokens, 2, device=DEVICE)
    targets = torch.full_like(case[2], -100)
    targets[rows] = case[2][rows]
    warm = dgrpo.linear_dgrpo_loss(
        case[0][:512], case[1], case[2][:512], case[3][:512],
        teacher=dgrpo.TeacherHead(teacher.hidden[:512], teacher.weight),
    )  # fmt: skip
    warm.loss.backward()  # the GEMMs' workspace is there from now on
    case[0].grad = case[1].grad = None
    del warm
    gc.collect()
    torch.cuda.synchronize()
    d_hidden, d_weight = tokens * width * 2, vocab * width
    vectors = 64 * 4 * tokens  # per-token statistics, coefficients and outputs
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = dgrpo.linear_dgrpo_loss(
        *case[:2], targets, case[3], teacher=teacher, rows=rows, memory_budget=budget
    )
    torch.cuda.synchronize()
    forward = torch.cuda.max_memory_allocated() - before
    slack = vectors + 64 * MIB
    assert forward <= budget + d_hidden + d_weight * (4 + 2) + slack, f"{forward / MIB:.0f} MiB"
    kept = torch.cuda.memory_allocated() - before
    assert kept <= d_hidden + d_weight * 2 + slack, f"{kept / MIB:.0f} MiB kept for backward"
    torch.cuda.reset_peak_memory_stats()
    out.loss.backward()
    torch.cuda.synchronize()
    backward = torch.cuda.max_memory_allocated() - before
    assert backward <= 2 * (d_hidden + d_weight * 2) + slack, f"{backward / MIB:.0f} MiB"
    assert out.loss.isfinite() and case[1].grad.isfinite().all()


@on_gpu
def test_memory_does_not_follow_the_number_of_tokens():
    peaks = []
    for tokens in (4096, 32768):
        case = big_case(tokens, 50257, 64)
        teacher = teacher_head(case)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stats = dgrpo.linear_token_stats(*case[:3], teacher, divergence="jsd", memory_budget=2**28)
        stats.divergence.sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before - 3 * tokens * 64 * 2)
        case = teacher = stats = None
    assert peaks[1] - peaks[0] <= 28672 * 64 * 4  # vectors alone
