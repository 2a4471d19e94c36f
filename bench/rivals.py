"""What people use today for the same loss, each as a function from a `Case` to a scalar.

The work: a clipped GRPO objective plus the full-vocabulary reverse KL to a teacher, from hidden
states, with the gradients of hidden states and head. Nobody else fuses the two terms, so those who
have one are measured on it, and in pairs that add up to both. `terms` says what a provider
computes; only equal terms compare.

A rival that is not installed, or that cannot run here, stays in the list with the reason.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import torch
from torch import Tensor

from bench.cases import Case
from bench.provider import NEEDS_GPU, Provider, clipped_loss
from bench.reference import BOTH, CROSS_ENTROPY, KL, POLICY
from bench.whole import torch_providers

LIGER_MODULES = ("liger_kernel.chunked_loss",)
TRL_MODULES = ("trl.trainer.utils", "trl.kernels.chunked_divergence")
RIVAL_MODULES = LIGER_MODULES + TRL_MODULES  # those that run without a GPU


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
    """Liger's chunked JSD loss at beta = 1, the reverse KL; 1024 tokens per chunk, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    head = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=case.hidden.is_cuda
    )
    inputs = (case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.targets)
    return case.teacher_coef * head(*inputs)


class _Headed:
    """What TRL's fused head patches: a model whose backbone gives the case's hidden states."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def __init__(self, case: Case):
        states = SimpleNamespace(last_hidden_state=case.hidden[None])
        self.base_model = self.model = lambda **unused: states
        self.get_output_embeddings = lambda: SimpleNamespace(weight=case.weight, bias=None)

    def forward(self) -> None:
        """Replaced by the patch."""


def trl_logprobs(case: Case) -> Tensor:
    """TRL's fused LM head with its defaults, then the clipped objective."""
    from trl.trainer.utils import add_fused_lm_head

    model = _Headed(case)
    add_fused_lm_head(model)
    found = model.forward(fused_lm_head=True, shift_labels=case.targets[None])
    return clipped_loss(case, found.log_probs[0])


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

    plain = torch_providers()
    policy = [
        Provider("TRL fused head", POLICY, trl_logprobs, trl),
        Provider("Liger GRPO", POLICY, liger_grpo, liger),
        Provider("CCE exact", POLICY, cce, cce_absent),
    ]
    divergence = [
        Provider("TRL divergence", KL, trl_divergence, trl),
        Provider("Liger JSD", KL, liger_jsd, liger),
    ]
    return [
        *(provider for provider in plain if provider.terms == BOTH),
        *(both(p, d) for p in policy for d in divergence),
        *policy,
        *divergence,
        *(provider for provider in plain if provider.terms != BOTH),
        Provider("quack cross-entropy", CROSS_ENTROPY, quack, quack_absent),
    ]
