"""Runs every kernel once at a small, awkward size: the program that compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m bench.every_kernel
compute-sanitizer --tool racecheck python -m bench.every_kernel
"""

from __future__ import annotations

import torch
from torch import Tensor

import dgrpo
from bench.options import device
from dgrpo.testing import peaked_case

TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 37, 48, 64, 3001  # none divides a block
DIVERGENCES = (
    {"divergence": "reverse_kl"},
    {"divergence": "forward_kl"},
    {"divergence": "clipped_forward_kl", "divergence_clip": 0.1},
    {"divergence": "jsd", "jsd_beta": 0.3},
)


def top_k(case) -> dgrpo.TopKTeacher:
    """The teacher of a case cut to its 8 best tokens."""
    log_q = (case.teacher_hidden.float() @ case.teacher_weight.float().T).log_softmax(-1)
    best = log_q.topk(8)
    target = log_q.gather(1, case.targets.clamp(min=0)[:, None])[:, 0]
    return dgrpo.TopKTeacher(best.indices, best.values, target)


def run(dtype: torch.dtype) -> list[Tensor]:
    """One forward and backward of every mode, divergence and teacher kind; the losses."""
    case = peaked_case(
        TOKENS,
        WIDTH,
        VOCAB,
        teacher_width=TEACHER_WIDTH,
        dtype=dtype,
        device=device(),
        masked=0.2,
    )
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    inputs = (hidden, weight, case.targets)
    full = dgrpo.TeacherHead(case.teacher_hidden, case.teacher_weight)
    best = top_k(case)
    policy = {"old_logprobs": case.old_logprobs, "memory_budget": 2**20}
    rare = {
        "ref_logprobs": case.ref_logprobs,
        "ref_coef": 0.1,
        "entropy_coef": 0.01,
        "logit_softcap": 40.0,
        "logit_scale": 0.9,
        "temperature": 1.1,
        "teacher_temperature": 0.8,
        "policy_logits": "bfloat16",
        "bias": torch.zeros(VOCAB, device=hidden.device),
    }
    losses = [dgrpo.linear_dgrpo_loss(*inputs, case.advantages, **policy).loss]
    for kind in DIVERGENCES:
        for teacher in (full, best):
            out = dgrpo.linear_dgrpo_loss(
                *inputs, case.advantages, teacher=teacher, **policy, **kind
            )
            losses.append(out.loss)
            stats = dgrpo.linear_token_stats(*inputs, teacher=teacher, **kind)
            losses.append((stats.logprobs + stats.divergence + stats.entropy).sum())
    out = dgrpo.linear_dgrpo_loss(*inputs, case.advantages, teacher=full, **policy, **rare)
    losses.append(out.loss)
    out = dgrpo.linear_loss(
        *inputs, lambda stats, rows: stats.divergence - stats.logprobs, teacher=full
    )
    losses.append(out.loss)
    for loss in losses:
        loss.backward()
    losses.append(dgrpo.linear_logprobs(hidden, weight, case.targets).logprobs.sum())
    if device().type == "cuda":
        torch.cuda.synchronize()
    return [loss.detach() for loss in losses]


def main() -> None:
    """Run all, in bf16, fp16 and fp32, and fail on a value that is not finite."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        losses = torch.stack([loss.float() for loss in run(dtype)])
        if not losses.isfinite().all():
            raise SystemExit(f"{dtype}: losses {losses.tolist()}, expected finite numbers")
        print(f"{dtype}: {len(losses)} losses, all finite")


if __name__ == "__main__":
    main()
