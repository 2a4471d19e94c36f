"""The numbers of one step over all tokens, micro-batches and ranks, in one collective."""

from __future__ import annotations

import functools
import itertools
import operator

import torch
from torch import Tensor

from dgrpo.distributed import ranks

Value = Tensor | float | int | bool


class StepMetrics:
    """Collects values through a step, on their device and without a sync; `reduce` ends the step.

    A mean is over everything that was given under its name on any rank, each value with its weight,
    and so does not depend on how tokens are split. A name that only some ranks have is right too.
    Values that are not finite are carried through.
    """

    def __init__(self):
        # Kind, values, weights; a mean's values are weighted. Plain, or fp64 scalars on the device.
        self._given: dict[str, tuple[str, list[Tensor | float], list[Tensor | float]]] = {}

    def mean(self, name: str, values: Value, weights: Value = 1.0) -> None:
        """Adds values, any shape, to a mean; `weights`: their shape, a mask or counts, or a number.

        What a weight of 0 or False masks may be anything, NaN included.
        """
        values = _exact(values)
        if not isinstance(weights, Tensor):
            weights = torch.full_like(values, weights)
        if weights.shape != values.shape:
            got, expected = tuple(weights.shape), tuple(values.shape)
            raise ValueError(f"weights: got {got}, expected the shape of values {expected}")
        weights = _exact(weights).to(values.device)
        total = torch.where(weights != 0, values * weights, 0.0).sum()
        self._add(name, "mean", total, weights.sum())

    def sum(self, name: str, value: Value) -> None:
        """Adds to a total over ranks and calls; a tensor is summed."""
        self._add(name, "sum", _exact(value).sum())

    def max(self, name: str, value: Value) -> None:
        """The largest over ranks and calls."""
        self._add(name, "max", _exact(value).amax())

    def min(self, name: str, value: Value) -> None:
        """The smallest over ranks and calls."""
        self._add(name, "min", _exact(value).amin())

    def _add(
        self, name: str, kind: str, value: Tensor | float, weight: Tensor | float = 1.0
    ) -> None:
        known, values, weights = self._given.setdefault(name, (kind, [], []))
        if known != kind:
            raise ValueError(f"{name}: got {kind}, expected {known} as before; use another name")
        values.append(value)
        weights.append(weight)

    def reduce(self) -> dict[str, float]:
        """The step's numbers, the same on every rank, and a fresh start. Collective; one sync.

        A mean with no weight at all is left out. Folded in rank order, so that every rank has the
        same bits.
        """
        for part in ranks().gather(self._folded()):
            for name, (kind, total, weight) in part.items():
                self._add(name, kind, total, weight)
        return {
            name: total / weight if kind == "mean" else total
            for name, (kind, total, weight) in self._folded().items()
            if kind != "mean" or weight != 0.0
        }

    def _folded(self) -> dict[str, tuple[str, float, float]]:
        """Kind, folded value and weight under each name, which are then forgotten."""
        given, self._given = self._given, {}
        numbers = iter(_numbers([n for _, *pair in given.values() for part in pair for n in part]))
        return {
            name: (
                kind,
                _fold(kind, [next(numbers) for _ in values]),
                _fold("sum", [next(numbers) for _ in weights]),
            )
            for name, (kind, values, weights) in given.items()
        }


def _fold(kind: str, numbers: list[float]) -> float:
    if kind in ("mean", "sum"):
        return functools.reduce(operator.add, numbers)  # in order: `sum` rounds otherwise
    tensor = torch.tensor(numbers, dtype=torch.float64)  # whose NaN wins
    return (tensor.max() if kind == "max" else tensor.min()).item()


def _exact(value: Value) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach()


def _numbers(values: list[Tensor | float]) -> list[float]:
    """Plain floats, with one transfer from the device."""
    away = [isinstance(value, Tensor) and value.device.type != "cpu" for value in values]
    there = list(itertools.compress(values, away))
    moved = iter(torch.stack(there).tolist() if there else [])
    return [next(moved) if far else float(v) for v, far in zip(values, away, strict=True)]
