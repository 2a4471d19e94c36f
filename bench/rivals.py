"""What people use today for the same loss, each as a function from a `Case` to a scalar.

The work: a clipped GRPO objective plus the full-vocabulary reverse KL to a teacher, from hidden
states, with the gradients of hidden states and head. Nobody else fuses the two terms, so those who
have one are measured on it, and in pairs that add up to both. `terms` says what a provider
computes; only equal terms compare.

A rival that is not installed, or that cannot run here, stays in the list with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case
from bench.reference import BOTH, CROSS_ENTROPY, KL, POLICY

NEEDS_GPU = "its Triton kernels need a GPU"
LIGER_MODULES = ("liger_kernel.chunked_loss",)
TRL_MODULES = ("trl.kernels.chunked_logprob", "trl.kernels.chunked_divergence")
RIVAL_MODULES = LIGER_MODULES + TRL_MODULES  # those that run without a GPU


@dataclass(frozen=True)
class Provider:
    """One way to compute the loss. `absent` is why it cannot run here, empty if it can."""

    name: str
    terms: str
    loss: Callable[[Case], Tensor]
    absent: str = ""
    ours: bool = False
    compiles: bool = False  # anew for every shape, which takes seconds
    contract: bool = False  # its time is one that the library promises
    most_tokens: int | None = None  # beyond which it is left out, for `too_many`
    too_many: str = ""

    def step(self, case: Case) -> Tensor:
        """Forward and backward; gradients land in `case`. Returns the loss, a scalar."""
        case.zero_grad()
        loss = self.loss(case)
        loss.backward()
        return loss


def clipped_loss(case: Case, logprobs: Tensor) -> Tensor:
    """`-mean(min(rho A, clip(rho) A))`, as every GRPO trainer writes it. logprobs (N,)."""
    ratio = (logprobs - case.old_logprobs).exp()
    bounded = ratio.clamp(1 - case.clip, 1 + case.clip)
    return -torch.minimum(ratio * case.advantages, bounded * case.advantages).mean()


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


def liger_grpo(case: Case) -> Tensor:
    """Liger's chunked GRPO loss, one sequence a chunk and (on a GPU) compiled: its defaults."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    per_sequence = (case.sequences, case.shape.tokens // case.sequences)
    head = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=case.hidden.is_cuda,
        use_ref_model=False,
        epsilon_low=case.clip,
        epsilon_high=case.clip,
    )
    loss, _ = head(
        case.hidden.view(*per_sequence, -1),
        case.weight,
        case.targets.view(per_sequence),
        torch.ones(per_sequence, device=case.hidden.device),
        case.advantages.view(per_sequence)[:, 0],
        old_per_token_logps=case.old_logprobs.view(per_sequence),
    )
    return loss


def liger_jsd(case: Case) -> Tensor:
    """Liger's chunked JSD loss at beta = 1, the reverse KL; 1024 tokens a chunk, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    head = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=case.hidden.is_cuda
    )
    inputs = (case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.targets)
    return case.teacher_coef * head(*inputs)


def trl_logprobs(case: Case) -> Tensor:
    """TRL's chunked log-probabilities (32768 columns, its default), then the clipped objective."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    found = ChunkedLogProbFunction.apply(
        case.hidden, case.weight, None, case.targets, 1.0, 32768, None, 1.0, ()
    )
    return clipped_loss(case, found[0])


def trl_divergence(case: Case) -> Tensor:
    """TRL's chunked divergence at beta = 1, which is the reverse KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    inputs = (case.hidden, case.weight, None, case.teacher_hidden, case.teacher_weight, None)
    divergence, _ = ChunkedDivergenceFunction.apply(*inputs, 1.0)
    return case.teacher_coef * divergence.mean()


def cce(case: Case) -> Tensor:
    """Apple's cut-cross-entropy without its gradient filter, then the clipped objective."""
    from cut_cross_entropy import linear_cross_entropy

    inputs = (case.hidden, case.weight, case.targets)
    nll = linear_cross_entropy(*inputs, reduction="none", filter_eps=None)
    return clipped_loss(case, -nll.float())


def quack(case: Case) -> Tensor:
    """quack's chunked linear cross-entropy: one weight for all tokens and no ratio."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(case.hidden, case.weight, case.targets)


def both(policy: Provider, divergence: Provider) -> Provider:
    """Two providers as one that computes both terms: the sum of their losses, one backward."""
    reasons = dict.fromkeys(filter(None, (policy.absent, divergence.absent)))
    return Provider(
        f"{policy.name} + {divergence.name}",
        BOTH,
        lambda case: policy.loss(case) + divergence.loss(case),
        "; ".join(reasons),
    )


def missing(distribution: str, *modules: str, gpu: bool = False) -> str:
    """Why a package cannot be used here (absent, broken, or in need of a GPU); else empty."""
    try:
        found = f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    if gpu and not torch.cuda.is_available():
        return f"{found}: {NEEDS_GPU}"
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever an optional rival raises must not end the comparison
            return f"{found} does not import: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def rivals() -> list[Provider]:
    """Everyone else's: those of both terms, pairs that add up to both, then single terms."""
    liger = missing("liger-kernel", *LIGER_MODULES)
    trl = missing("trl", *TRL_MODULES)
    cce_absent = missing("cut-cross-entropy", "cut_cross_entropy", gpu=True)
    quack_absent = missing("quack-kernels", "quack.linear_cross_entropy", gpu=True)

    policy = [
        Provider("TRL logprob", POLICY, trl_logprobs, trl),
        Provider("Liger GRPO", POLICY, liger_grpo, liger),
        Provider("CCE exact", POLICY, cce, cce_absent),
    ]
    divergence = [
        Provider("TRL divergence", KL, trl_divergence, trl),
        Provider("Liger JSD", KL, liger_jsd, liger),
    ]
    return [
        Provider("full logits, eager", BOTH, full_logits),
        Provider("full logits, compiled", BOTH, compiled_full_logits, compiles=True),
        *(both(p, d) for p in policy for d in divergence),
        *policy,
        *divergence,
        Provider("quack cross-entropy", CROSS_ENTROPY, quack, quack_absent),
    ]
