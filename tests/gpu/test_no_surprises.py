"""On a GPU: the vendor's products, streams, devices, host syncs, recompilation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dgrpo
from dgrpo.ops import gemm
from tests.gpu.device import DEVICE, MIB, gpu_tests, on_gpu, small, weighed
from tests.ops.cases import (
    DIVERGENCES,
    TEACHERS,
    case_of,
    check_dgrpo,
    gradients,
    teacher_of,
)

pytestmark = gpu_tests


@on_gpu
def test_the_vendors_products_are_used():
    """Both probes succeed, and neither fallback runs, in bf16 and in fp16."""
    for dtype in (torch.bfloat16, torch.float16):
        like = torch.empty(1, dtype=dtype, device=DEVICE)
        for name in ("mm", "addmm"):
            assert gemm.writes_fp32(name, like), f"no {name}(out_dtype=float32) in {dtype}"
    case, seen = small(torch.bfloat16), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.overloadpacket.__name__:
                seen.append(func._overloadname)
            return func(*args, **(kwargs or {}))

    with Watch():
        dgrpo.linear_dgrpo_loss(
            case.hidden, case.weight, case.targets, case.advantages,
            teacher=teacher_of("full", case),
        )  # fmt: skip
    assert len(seen) == 4 and all("dtype" in name for name in seen), seen


@on_gpu
def test_another_stream_than_the_default():
    case = small(torch.bfloat16, tokens=1000)
    teacher = teacher_of("full", case)

    def run():
        out = dgrpo.linear_dgrpo_loss(
            case.hidden, case.weight, case.targets, case.advantages, teacher=teacher,
            memory_budget=4 * MIB,
        )  # fmt: skip
        return [out.logprobs, out.divergence, *gradients(out.loss, case.hidden, case.weight)]

    want = run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whatever runs on the default stream runs too early
        got = run()
    stream.synchronize()
    assert all(map(torch.equal, got, want))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current():
    case = case_of(100, 501, device="cuda:1")
    check_dgrpo(case, 1e-4, teacher=teacher_of("full", case))


@on_gpu
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("op", ["fused", "plain", "stats", "logprobs"])
def test_no_host_sync_when_rows_are_given(op, kind):
    case = small(torch.float16, tokens=500)
    teacher = teacher_of(kind, case)
    rows = (case.targets != -100).nonzero()[:, 0]
    weights = torch.rand(500, device=DEVICE)
    inputs = (case.hidden, case.weight, case.targets)
    shared = {"rows": rows, "memory_budget": 4 * MIB}
    upstream = torch.ones((), device=DEVICE)

    def run(divergence):
        given = {"teacher": teacher, **shared, **DIVERGENCES[divergence]}
        if op == "fused":
            loss = dgrpo.linear_dgrpo_loss(
                *inputs, case.advantages, token_weights=weights, teacher_coef=weights, **given
            ).loss
        elif op == "plain":
            loss = dgrpo.linear_loss(*inputs, lambda s, r: weighed(s) * weights[r], **given).loss
        elif op == "stats":
            loss = (weighed(dgrpo.linear_token_stats(*inputs, **given)) * weights).sum()
        else:
            return dgrpo.linear_logprobs(*inputs, **shared)
        torch.autograd.grad(loss, inputs[:2], upstream)
        return None

    for divergence in DIVERGENCES:
        run(divergence)  # compiles, probes and fills caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for divergence in DIVERGENCES:
            run(divergence)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("kind", ["full", "by_rows"])
def test_a_teacher_on_the_host_is_streamed(kind, pinned):
    case = small(torch.bfloat16, tokens=3000)
    teacher = teacher_of(kind, case)
    rows = None if teacher.rows is None else teacher.rows.cpu()
    host = teacher.hidden.cpu()
    host = host.pin_memory() if pinned else host
    away = dgrpo.TeacherHead(host, teacher.weight, rows=rows)
    unmasked = (case.targets != -100).nonzero()[:, 0]
    found = []
    for given, where in ((teacher, unmasked), (away, unmasked.cpu()), (away, None)):
        out = dgrpo.linear_dgrpo_loss(
            case.hidden, case.weight, case.targets, case.advantages, teacher=given, rows=where,
            memory_budget=8 * MIB,
        )  # fmt: skip
        found.append([out.divergence, *gradients(out.loss, case.hidden, case.weight)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@on_gpu
def test_a_streamed_teacher_costs_no_sync():
    case = small(torch.bfloat16, tokens=3000)
    teacher = teacher_of("full", case)
    away = dgrpo.TeacherHead(teacher.hidden.cpu().pin_memory(), teacher.weight)
    rows = (case.targets != -100).nonzero()[:, 0].cpu()

    def run():
        dgrpo.linear_dgrpo_loss(
            case.hidden, case.weight, case.targets, case.advantages, teacher=away, rows=rows,
            memory_budget=8 * MIB,
        ).loss.backward()  # fmt: skip

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_costs_no_sync():
    """Packing's tensors to the device, the body, the head's loss with a teacher, and backward."""
    from dgrpo.trainer.batch import pack
    from dgrpo.trainer.policy import PolicyModel
    from dgrpo.trainer.teachers import Teacher
    from tests.tiny import make_samples, tiny_model

    policy, teacher = (
        PolicyModel(tiny_model("qwen3", seed=seed)).to(DEVICE).train() for seed in (0, 1)
    )
    samples = make_samples([(5, 9), (7, 3), (2, 12)])
    teacher = Teacher(teacher)
    teacher.attach(samples, 64)
    micros = pack(samples, 32)

    def step():
        for micro in micros:
            micro = micro.to(DEVICE)
            inputs = micro.head_inputs(teacher=teacher.head(micro))
            policy(micro, inputs).loss.backward()

    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def compiled_kernels():
    """How many variants of each kernel Triton has compiled in this process."""
    from dgrpo_kernels import row_divergence, row_grad, row_stats, topk

    kernels = (
        row_stats._row_stats_kernel,
        row_divergence._row_divergence_kernel,
        row_grad._row_grad_kernel,
        topk._topk_take_kernel,
        topk._topk_put_kernel,
    )
    return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["full", "topk"])
def test_nothing_is_compiled_again(kind, dtype):
    def run(tokens, number=0.2):
        case = case_of(tokens, 1001, dtype=dtype, device=DEVICE, masked=0.0)
        if tokens > 2:
            case.targets[1::3] = -100
        teacher = teacher_of(kind, case)
        inputs = (case.hidden, case.weight, case.targets)
        for budget in (2**30, 2**18):
            options = {"teacher": teacher, "memory_budget": budget, "divergence": "jsd"}
            options |= {"jsd_beta": 0.1 + number / 2, "temperature": 1.5 + number}
            dgrpo.linear_dgrpo_loss(
                *inputs, case.advantages, old_logprobs=case.old_logprobs, clip_low=number,
                ref_logprobs=case.ref_logprobs, ref_coef=number, entropy_coef=number,
                teacher_coef=number, clip_dual=3.0 if number else None, **options,
            ).loss.backward()  # fmt: skip
            dgrpo.linear_token_stats(*inputs, **options).divergence.sum().backward()

    run(64)
    before = compiled_kernels()
    assert sum(before) > 0
    for tokens in (1, 15, 16, 4097):
        run(tokens)
    for number in (0.0, 1.0, 0.3):
        run(64, number)
    assert compiled_kernels() == before
