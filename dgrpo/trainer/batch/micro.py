"""A packed micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dgrpo.head import HeadInputs
from dgrpo.objectives import Context
from dgrpo.ops import Options
from dgrpo.trainer.attention.packed import Prefixes
from dgrpo.trainer.batch.sample import Sample


@dataclass(frozen=True)
class Micro:
    """S sequences laid end to end, ready for one forward pass. Made by `pack`.

    A sequence is a whole sample. Samples that share a prompt take several: first their prefix (the
    prompt without its last token), then one branch each (that token and the completion).
    """

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, from 0 in each sequence, from P - 1 in a branch
    cu_seqlens: Tensor  # (S + 1,) int32
    lengths: tuple[int, ...]  # of the S sequences
    sequence_ids: Tensor  # (T,) int64, 0 ... S - 1
    targets: Tensor  # (T,) int64, -100 = no loss
    rows: Tensor  # (n,) int64, the tokens with loss
    context: Context | None  # (T,) tensors; None where the samples have no token weights
    teacher_rows: Tensor  # (T,) int64: row of the teacher's hidden states, -1 = none
    prefixes: Prefixes | None  # which sequences are prefixes; None where there is none
    samples: tuple[Sample, ...]  # () for a filler
    starts: tuple[int, ...]  # of each sample: the token that predicts its completion's first one
    indices: tuple[int, ...]  # of the samples in the list given to `pack`

    def to(self, device: torch.device | str) -> Micro:
        """The same micro with its own tensors on `device`; the samples stay where they are."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | Context | Prefixes)
        }
        return replace(self, **moved)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first token, C) of each sample: tokens whose hidden states predict its completion."""
        counts = [len(sample.completion_ids) for sample in self.samples]
        return list(zip(self.starts, counts, strict=True))

    def head_inputs(
        self,
        mode: str = "loss",
        *,
        teacher: Any = None,
        objective: Callable | None = None,
        sequence_objective: Callable | None = None,
        options: Options | None = None,
    ) -> HeadInputs:
        """What the loss head needs for this micro; `teacher` comes from `Teacher.head(micro)`.

        Raises:
            ValueError: a loss is asked for and the samples have no token weights.
        """
        if self.context is None and mode != "logprobs":
            raise ValueError(
                f"token_weights: got None in a sample, expected (C,) weights for mode {mode!r}; "
                "compute them from the masks of the whole batch before packing"
            )
        return HeadInputs(
            targets=self.targets,
            mode=mode,
            context=self.context,
            objective=objective,
            sequence_objective=sequence_objective,
            options=replace(options or Options(), teacher=teacher, rows=self.rows),
        )

    def per_sample(self, values: Tensor) -> list[tuple[int, Tensor]]:
        """Split `values` (T,): (index in the list given to `pack`, (C,) values on the CPU) each."""
        if values.numel() != self.targets.numel():
            raise ValueError(
                f"values: got {values.numel()} elements, expected {self.targets.numel()}, "
                "one per token of the micro"
            )
        values = values.detach().reshape(-1).cpu()
        pieces = [values[start : start + tokens].clone() for start, tokens in self.spans]
        return list(zip(self.indices, pieces, strict=True))
