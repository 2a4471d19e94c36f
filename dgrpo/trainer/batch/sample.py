"""One prompt and its completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # target of a token without loss
SHARED = ("token_weights", "old_logprobs", "ref_logprobs", "sampler_logprobs", "policy_weights")
PER_TOKEN = ("advantages", "loss_mask", "teacher_coef", "teacher_mask", "teacher_rows", *SHARED)


@dataclass
class Sample:
    """One prompt and its completion, on the CPU. `(C,)` tensors are aligned with `completion_ids`.

    The packed sequence is prompt + completion without its last token, which predicts nothing: the
    hidden state at position `P - 1 + i` predicts completion token i. Samples of one `group` with
    the same prompt share all of it but its last token.

    Raises:
        ValueError: an empty prompt or completion, or a per-token tensor of another length.
    """

    prompt_ids: Tensor  # (P,) int64
    completion_ids: Tensor  # (C,) int64
    advantages: Tensor | None = None  # (C,) fp32; None = 0
    loss_mask: Tensor | None = None  # (C,) bool; None = all tokens carry loss
    token_weights: Tensor | None = None  # (C,) fp32, global weights; None = only scored
    old_logprobs: Tensor | None = None  # (C,) fp32, as the next three
    ref_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    policy_weights: Tensor | None = None
    teacher_coef: Tensor | None = None  # (C,) fp32; None = the coefficient given to `pack`
    teacher_prompt_ids: Tensor | None = None  # (P',) int64: the teacher sees this prompt instead
    teacher_mask: Tensor | None = None  # (C,) bool: tokens that the teacher guides; None = all
    teacher_rows: Tensor | None = None  # (C,) int64, by a teacher: row of its states, -1 = none
    topk: tuple[Tensor, Tensor] | None = None  # by a teacher: ids and log-probabilities, (C, K)
    group: int = 0  # samples of one number, e.g. the completions of a prompt, may share it
    index: int = 0
    tags: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "completion_ids"):
            value = getattr(self, name)
            if value.dim() != 1 or value.numel() == 0:
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, expected (n,) with n >= 1; for text "
                    "without a prompt take its first token as the prompt"
                )
        tokens = self.completion_ids.numel()
        for name in PER_TOKEN:
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != (tokens,):
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, expected ({tokens},), one entry a "
                    "completion token"
                )

    @property
    def length(self) -> int:
        """Number of packed tokens of the sample alone, P + C - 1."""
        return self.prompt_ids.numel() + self.completion_ids.numel() - 1

    @property
    def mask(self) -> Tensor:
        """(C,) bool: tokens with loss."""
        if self.loss_mask is not None:
            return self.loss_mask
        return torch.ones_like(self.completion_ids, dtype=torch.bool)

    @property
    def guided(self) -> Tensor:
        """(C,) bool: tokens with loss that the teacher guides."""
        return self.mask if self.teacher_mask is None else self.mask & self.teacher_mask

    def seen_by_teacher(self) -> Sample:
        """The sample as the teacher reads it: its prompt, masked to the tokens that it guides."""
        own = self.teacher_prompt_ids
        prompt = self.prompt_ids if own is None else own
        return Sample(prompt, self.completion_ids, loss_mask=self.guided, group=self.group)
