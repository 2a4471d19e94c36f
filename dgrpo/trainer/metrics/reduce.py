"""The numbers of one step over all tokens, micro-batches and ranks, in one collective."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

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
        # Kind, values, weights; a mean's values are weighted. fp64 scalars, on a device or plain.
        self._given: dict[str, tuple[str, list[Value], list[Value]]] = {}

    def mean(self, name: str, values: Value, weights: Value | None = None) -> None:
        """Adds values, any shape, to a mean; `weights`, a mask or counts, has their shape.

        None is a weight of 1. What a weight of 0 or False masks may be anything, NaN included.
        """
        if not isinstance(values, Tensor):
            weight = 1.0 if weights is None else float(weights)
            self._add(name, "mean", float(values) * weight if weight else 0.0, weight)
            return
        values = values.detach().double()
        if weights is None:
            self._add(name, "mean", values.sum(), float(values.numel()))
            return
        if not isinstance(weights, Tensor) or weights.shape != values.shape:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"weights: got {got}, expected the shape of values {tuple(values.shape)}"
            )
        weights = weights.detach().to(device=values.device, dtype=values.dtype)
        total = torch.where(weights != 0, values * weights, 0.0).sum()
        self._add(name, "mean", total, weights.sum())

    def sum(self, name: str, value: Value) -> None:
        """Adds to a total over ranks and calls; a tensor is summed."""
        self._add(name, "sum", _scalar(value, torch.sum), 1.0)

    def max(self, name: str, value: Value) -> None:
        """The largest over ranks and calls."""
        self._add(name, "max", _scalar(value, torch.amax), 1.0)

    def min(self, name: str, value: Value) -> None:
        """The smallest over ranks and calls."""
        self._add(name, "min", _scalar(value, torch.amin), 1.0)

    def _add(self, name: str, kind: str, value: Value, weight: Value) -> None:
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
        every = [number for _, *pair in given.values() for part in pair for number in part]
        numbers = iter(_numbers(every))
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


def _scalar(value: Value, fold: Callable[[Tensor], Tensor]) -> Value:
    return fold(value.detach().double()) if isinstance(value, Tensor) else float(value)


def _numbers(values: list[Value]) -> list[float]:
    """Plain floats, with one transfer for each device that values lie on."""
    numbers: list[float] = [0.0] * len(values)
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(i)
        else:
            numbers[i] = float(value)
    for places in by_device.values():
        moved = torch.stack([values[i].double() for i in places]).tolist()
        for i, number in zip(places, moved, strict=True):
            numbers[i] = number
    return numbers
