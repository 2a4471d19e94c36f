"""What an objective needs beside a token's statistics: advantages, weights, coefficients."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def python_number(value: Any) -> Any:
    """A scalar of numpy as Python's own int or float; anything else as it is."""
    if isinstance(value, Integral):
        return value if type(value) in (int, bool) else int(value)
    return float(value) if isinstance(value, Real) else value


@dataclass(frozen=True)
class Context:
    """Per-token inputs of an objective, all of one shape `(N,)` (or `(R,)` after `at`).

    Tensors are constants: no gradient flows into them. Scalars may change between calls without
    recompilation.
    """

    advantages: Tensor  # (N,) A
    token_weights: Tensor  # (N,) w, every normaliser included
    old_logprobs: Tensor | None = None  # (N,) None = on-policy: ratio 1, with gradient
    ref_logprobs: Tensor | None = None  # (N,) reference policy, for the k3 penalty
    policy_weights: Tensor | None = None  # (N,) u, multiplies the policy term only
    sampler_logprobs: Tensor | None = None  # (N,) u = min(exp(logp - sampler), is_cap), detached
    is_cap: float | None = None  # None = no cap
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float | None = None  # c > 1 of dual clip, for negative advantages
    teacher_coef: float | Tensor = 0.5  # beta, a number or (N,); 0 skips a token's divergence
    ref_coef: float = 0.0
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                object.__setattr__(self, field.name, python_number(value))

    def at(self, rows: Tensor | slice) -> Context:
        """The same context at the tokens `rows` ((R,) int64 indices, or a slice).

        Raises ValueError naming a field that is too short for them (on the CPU).
        """
        picked = {}
        for name, value in self.per_token().items():
            try:
                picked[name] = value.reshape(-1)[rows]
            except IndexError:
                wanted = f"expected one per token, at least {int(rows.max()) + 1}"
                raise ValueError(f"{name}: got {value.numel()} values, {wanted}") from None
        return replace(self, **picked)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def per_token(self) -> dict[str, Tensor]:
        """The fields that hold one value per token, by name."""
        return {name: value for name, value in self._tensors().items() if value.dim()}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Context:
        """The same context with its tensors on `device`."""
        options = {"device": device, "non_blocking": non_blocking}
        return replace(self, **{name: x.to(**options) for name, x in self._tensors().items()})
