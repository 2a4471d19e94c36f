"""One way to compute a loss, ours or anyone's, as a function from a `Case` to a scalar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case

NEEDS_GPU = "its Triton kernels need a GPU"


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
