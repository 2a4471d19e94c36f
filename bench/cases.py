"""The inputs that every provider of one comparison works on: peaked logits, as trained models have.

Near-uniform logits flatter kernels that skip small gradients, and hide what bf16 logits cost; hence
`dgrpo.testing.peaked_case`. A few hundred or thousand distinct tokens are drawn and repeated up to
N, each repeat with a ratio of its own: drawing 131072 of them would take longer than what is
measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.sizes import Shape
from dgrpo.testing import near_equal_teacher, peaked_case

TEACHERS = ("other", "near")


@dataclass(frozen=True)
class Case:
    """Inputs of one step. `hidden` and `weight` are leaves that require a gradient."""

    shape: Shape
    hidden: Tensor  # (N, Hs)
    weight: Tensor  # (V, Hs)
    targets: Tensor  # (N,) int64, all of them counted
    advantages: Tensor  # (N,) fp32, constant within a sequence
    old_logprobs: Tensor  # (N,) fp32
    teacher_hidden: Tensor  # (N, Ht)
    teacher_weight: Tensor  # (V, Ht)
    sequences: int  # the tokens are this many sequences of equal length
    clip: float = 0.2
    teacher_coef: float = 0.5

    def first(self, rows: int) -> Case:
        """The first `rows` tokens, a multiple of `sequences`; the head is the same leaf."""
        return replace(
            self,
            shape=self.shape.at(rows),
            hidden=self.hidden.detach()[:rows].requires_grad_(),
            targets=self.targets[:rows],
            advantages=self.advantages[:rows],
            old_logprobs=self.old_logprobs[:rows],
            teacher_hidden=self.teacher_hidden[:rows],
        )

    def zero_grad(self) -> None:
        """Free the gradients of the last step."""
        self.hidden.grad = self.weight.grad = None

    def gradient_bytes(self) -> int:
        """Bytes of the two gradients that a step must leave behind."""
        return sum(x.numel() * x.element_size() for x in (self.hidden, self.weight))


def make_case(
    shape: Shape,
    device: torch.device | str = "cpu",
    *,
    teacher: str = "other",
    kl: float = 0.01,
    sequences: int = 8,
    distinct: int | None = None,
    seed: int = 0,
) -> Case:
    """Draw the inputs of `shape` on `device`.

    teacher "other": its own weights, favouring the student's token on four rows of five. "near":
    the student's own head on hidden states moved until the KL is about `kl` nats, as late in a
    distillation; needs Ht = Hs.
    distinct: how many different tokens; 2048 on a GPU and 256 on a CPU unless given.
    """
    if teacher not in TEACHERS:
        raise ValueError(f"teacher: got {teacher!r}, expected one of {TEACHERS}")
    if shape.tokens % sequences:
        raise ValueError(f"tokens: got {shape.tokens}, expected a multiple of {sequences}")
    if teacher == "near" and shape.hidden != shape.teacher_hidden:
        raise ValueError(
            f"teacher: got 'near' with Hs={shape.hidden}, Ht={shape.teacher_hidden}, expected "
            "equal widths; use 'other'"
        )
    device = torch.device(device)
    rows = shape.tokens
    distinct = min(rows, distinct or (256 if device.type == "cpu" else 2048))
    drawn = peaked_case(
        distinct,
        shape.hidden,
        shape.vocab,
        teacher_width=shape.teacher_hidden,
        dtype=getattr(torch, shape.dtype),
        device=device,
        seed=seed,
    )
    theirs, their_weight = drawn.teacher_hidden, drawn.teacher_weight
    if teacher == "near":
        theirs, their_weight = near_equal_teacher(drawn.hidden, drawn.weight, kl=kl, seed=seed)
    logp = logprobs(drawn.hidden, drawn.weight, drawn.targets)

    def repeated(values: Tensor) -> Tensor:
        times = -(-rows // distinct)
        return values.repeat(times, *[1] * (values.dim() - 1))[:rows].contiguous()

    generator = torch.Generator(device).manual_seed(seed)
    advantages = torch.randn(sequences, device=device, generator=generator)
    return Case(
        shape,
        repeated(drawn.hidden).requires_grad_(),
        drawn.weight.requires_grad_(),
        repeated(drawn.targets),
        advantages.repeat_interleave(rows // sequences),
        repeated(logp) + log_ratios(rows, generator),
        repeated(theirs),
        their_weight.detach(),
        sequences,
    )


@torch.no_grad()
def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, block: int = 256) -> Tensor:
    """Log-probabilities of the targets, a block of rows at a time, logits in fp32. (N,) fp32."""
    parts = []
    for rows in torch.arange(len(targets), device=targets.device).split(block):
        # By slices of the head, so that no fp32 copy of all of it exists.
        slices = [hidden[rows].float() @ piece.float().T for piece in weight.chunk(8)]
        log_p = torch.cat(slices, dim=1).log_softmax(-1)
        parts.append(log_p.gather(1, targets[rows, None])[:, 0])
    return torch.cat(parts)


def log_ratios(rows: int, generator: torch.Generator) -> Tensor:
    """What to add to log-probabilities for old ones: a third is clipped, none near the edge.

    A row at the edge would turn any rounding into a jump, and the error of a gradient into noise.
    """
    draw = {"device": generator.device, "generator": generator}
    kind = torch.randint(6, (rows,), **draw)
    small = 0.1 * (2 * torch.rand(rows, **draw) - 1)  # ratios 0.90 – 1.11
    return small + torch.where(kind == 0, 0.5, torch.where(kind == 1, -0.5, 0.0))
