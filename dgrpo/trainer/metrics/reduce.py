"""The numbers of one step over all tokens, micro-batches and ranks, with one exchange."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

Value = Tensor | float | int | bool

_FOLD: dict[str, Callable[[float, float], float]] = {
    "mean": lambda a, b: a + b,
    "sum": lambda a, b: a + b,
    "max": max,
    "min": min,
}


class StepMetrics:
    """Collects values through a step, on their device and without a sync; `reduce` ends the step.

    A mean is over everything that was given under its name on any rank, each value with its weight,
    and so does not depend on how tokens are split. A name that only some ranks have is right too.
    Values that are not finite are carried through.
    """

    def __init__(self):
        self._kinds: dict[str, str] = {}
        # (sum, weight) for a mean, (value, 1) else; fp64 scalars, on a device or plain
        self._values: dict[str, tuple[Value, Value]] = {}

    def mean(self, name: str, values: Value, weights: Value | None = None) -> None:
        """Adds values, any shape, to a mean; `weights`, a mask or counts, has their shape.

        None is a weight of 1. What a weight of 0 or False masks may be anything, NaN included.
        """
        if not isinstance(values, Tensor):
            weight = 1.0 if weights is None else float(weights)
            self._add(name, "mean", float(values) * weight if weight else 0.0, weight)
            return
        values = values.detach().to(_wide(values))
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
        known = self._kinds.setdefault(name, kind)
        if known != kind:
            raise ValueError(f"{name}: got {kind}, expected {known} as before; use another name")
        if name not in self._values:
            self._values[name] = (value, weight)
            return
        before, count = self._values[name]
        if kind in ("mean", "sum"):
            self._values[name] = (before + value, count + weight)
        elif isinstance(value, Tensor) or isinstance(before, Tensor):
            fold = torch.maximum if kind == "max" else torch.minimum
            pair = [torch.as_tensor(x, dtype=torch.float64) for x in (before, value)]
            device = next((x.device for x in pair if x.device.type != "cpu"), pair[0].device)
            self._values[name] = (fold(pair[0].to(device), pair[1].to(device)), 1.0)
        else:
            self._values[name] = (_FOLD[kind](before, value), 1.0)

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """The step's numbers, the same on every rank, and a fresh start. Collective; one sync.

        A mean with no weight at all is left out. Folded in rank order, so that every rank has the
        same bits.
        """
        kinds, values = self._kinds, self._values
        self._kinds, self._values = {}, {}
        flat = _numbers([number for pair in values.values() for number in pair])
        own = {
            name: (kinds[name], total, weight)
            for name, total, weight in zip(values, flat[::2], flat[1::2], strict=True)
        }
        everyone = [own]
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            everyone = [None] * dist.get_world_size(group)
            dist.all_gather_object(everyone, own, group=group)
        folded: dict[str, tuple[str, float, float]] = {}
        for part in everyone:
            for name, (kind, total, weight) in part.items():
                if name in folded:
                    _, before, count = folded[name]
                    total, weight = _FOLD[kind](before, total), count + weight
                folded[name] = (kind, total, weight)
        return {
            name: total / weight if kind == "mean" else total
            for name, (kind, total, weight) in folded.items()
            if kind != "mean" or weight != 0.0
        }


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _scalar(value: Value, fold: Callable[[Tensor], Tensor]) -> Value:
    if not isinstance(value, Tensor):
        return float(value)
    return fold(value.detach().to(_wide(value)))


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
