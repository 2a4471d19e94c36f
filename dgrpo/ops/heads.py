"""One model's side of the sweep: its hidden states, its head, and blocks of its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dgrpo.ops.gemm import accumulator, project
from dgrpo.ops.plan import padded
from dgrpo_kernels.rows import Logits


@dataclass(frozen=True)
class Head:
    """Hidden states and head of a student or a teacher, detached, and how its logits come about."""

    hidden: Tensor  # (N, H) or (B, T, H), any strides, on the device or (a teacher's) on the host
    weight: Tensor  # (V, H), the compared columns, in the dtype of the products
    bias: Tensor | None  # (padded V,) in the accumulator's dtype
    scale: float
    softcap: float | None
    temperature: float
    holes: bool  # some logits may be -inf

    def gather(self, rows: Tensor | slice) -> Tensor:
        """Hidden states of the tokens `rows`, (R, H) on the device; streams from the host."""
        hidden = self.hidden
        if hidden.dim() == 3:
            if isinstance(rows, slice):
                rows = torch.arange(rows.start, rows.stop, device=hidden.device)
            picked = hidden[rows // hidden.shape[1], rows % hidden.shape[1]]
        else:
            picked = hidden[rows] if isinstance(rows, slice) else hidden.index_select(0, rows)
        if picked.is_cpu and self.weight.is_cuda:
            picked = picked.pin_memory()
        return picked.to(self.weight.device, self.weight.dtype, non_blocking=True)

    def logits(self, hidden: Tensor, buffer: Tensor, scratch: int) -> Logits:
        """Project `hidden` (R, H) into `buffer` (>= R, padded V)."""
        raw = buffer[: len(hidden), : len(self.weight)]
        project(hidden, self.weight, raw, scratch)
        return Logits(raw, self.bias, self.scale, self.softcap, self.temperature, self.holes)


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    columns: int,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    temperature: float,
    holes: bool = False,
) -> Head:
    """Cut a head to its first `columns` columns and cast what the products take."""
    weight = weight.detach()[:columns].to(dtype)
    if bias is not None:
        bias = bias.detach()[:columns].to(weight.device, accumulator(dtype))
        bias = F.pad(bias, (0, padded(columns) - columns))
    hidden = hidden.detach()
    if not hidden.shape[:-1].numel():  # a teacher of nobody: a row for the tokens without one
        hidden = hidden.new_zeros(1, hidden.shape[-1])
    if hidden.dim() == 3 and hidden.is_contiguous():
        hidden = hidden.flatten(0, 1)
    cap = None if softcap is None else float(softcap)
    holes = holes or bias is not None
    return Head(hidden, weight, bias, float(scale), cap, float(temperature), holes)


def transformed(linear: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Plain logits of a linear layer's output: scaled and softly capped. -inf (a bias) stays."""
    z = linear * scale
    if softcap is None:
        return z
    return (torch.tanh(z / softcap) * softcap).masked_fill(z == -torch.inf, -torch.inf)


def logits_buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    """Space for `rows` rows of logits in the accumulator's dtype."""
    return torch.empty(rows, padded(columns), dtype=accumulator(like.dtype), device=like.device)
