"""What plain PyTorch offers: whole `[N, V]` logits, and its own fused cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case
from bench.provider import Provider, clipped_loss
from bench.reference import BOTH, CROSS_ENTROPY, FORWARD_KL, POLICY


def full_logits(case: Case) -> Tensor:
    """Both terms from whole `[N, V]` logits by autograd, as trainers do without a fused loss.

    Logits come in the dtype of the inputs, softmax is in fp32.
    """
    log_p = F.linear(case.hidden, case.weight).float().log_softmax(-1)
    log_q = F.linear(case.teacher_hidden, case.teacher_weight).float().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    logprobs = log_p.gather(1, case.targets[:, None])[:, 0]
    return clipped_loss(case, logprobs) + case.teacher_coef * divergence.mean()


_compiled_full_logits = torch.compile(full_logits)


def compiled_full_logits(case: Case) -> Tensor:
    """`full_logits` under torch.compile."""
    return _compiled_full_logits(case)


def separate_terms(case: Case) -> Tensor:
    """`(B, T, V)` logits of both models, then each term by itself, as SDPG's trainer does.

    The policy term takes its own log-softmax, the KL two more, all in fp32.
    """
    sequences = (case.sequences, case.shape.tokens // case.sequences)
    z = F.linear(case.hidden.view(*sequences, -1), case.weight)
    with torch.no_grad():
        t = F.linear(case.teacher_hidden.view(*sequences, -1), case.teacher_weight)
    picked = z.float().log_softmax(-1).gather(-1, case.targets.view(*sequences, 1))
    log_p, log_q = z.float().log_softmax(-1), t.float().log_softmax(-1)
    # KL(p | q): the target of `kl_div` is its first argument in the formula.
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return clipped_loss(case, picked.flatten()) + case.teacher_coef * divergence.mean()


def chunked(case: Case, **options) -> Tensor:
    """`linear_cross_entropy` in chunks of tokens, sized as torch chooses."""
    options["options"] = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(case.hidden, case.weight, case.targets, **options)


def torch_policy(case: Case) -> Tensor:
    """The clipped objective on torch's chunked log-probabilities; chunks again in backward."""
    return clipped_loss(case, -chunked(case, reduction="none").float())


def torch_distillation(case: Case) -> Tensor:
    """Forward KL: cross-entropy to the teacher's probabilities, less their entropy.

    Torch takes probabilities only whole, and then does not chunk.
    """
    with torch.no_grad():
        log_q = F.linear(case.teacher_hidden, case.teacher_weight).float().log_softmax(-1)
        q = log_q.exp()
        entropy = -(q * log_q).sum(-1).mean()
    cross = F.linear_cross_entropy(case.hidden, case.weight, q.to(case.hidden.dtype))
    return case.teacher_coef * (cross - entropy)


def torch_providers() -> list[Provider]:
    """Whole logits in three ways, and `linear_cross_entropy` where torch has it."""
    absent = ""
    if not hasattr(F, "linear_cross_entropy"):
        absent = f"torch {torch.__version__} has no linear_cross_entropy"
    return [
        Provider("full logits, eager", BOTH, full_logits),
        Provider("full logits, compiled", BOTH, compiled_full_logits, compiles=True),
        Provider("full logits, SDPG style", BOTH, separate_terms),
        Provider("torch linear CE, policy", POLICY, torch_policy, absent),
        Provider("torch linear CE, SFT", CROSS_ENTROPY, chunked, absent),
        Provider("torch linear CE, KD", FORWARD_KL, torch_distillation, absent),
    ]
