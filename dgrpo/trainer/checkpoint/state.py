"""What a checkpoint holds besides parameters and optimiser state, as JSON and tensors.

A tree of dict, list, tuple, tensor, str, int, float, bool and None becomes one JSON text plus named
tensors, and back; floats survive exactly. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field, fields

import numpy
import torch

_TAGS = ("__tensor__", "__tuple__", "__items__")


@dataclass
class RunState:
    """Where a run stands, besides its parameters, optimisers and random numbers.

    All fields but `rollouts` are the same on every rank; rank 0's are kept. `data` and an entry of
    `rollouts` are trees of dict, list, tuple, tensor, str, int, float, bool and None.
    """

    step: int = 0  # optimiser steps finished
    data: dict = field(default_factory=dict)  # the position in the data
    skipped: int = 0  # steps in all whose loss or gradient was not finite
    skipped_in_row: int = 0  # how many of them are the latest ones
    average: float | None = None  # the moving average of the metric of `until`
    pending: int = 0  # batches that the rollouts in flight belong to
    # Rollouts in flight on this rank. An entry (a group, say) stays whole and on one rank.
    rollouts: list = field(default_factory=list)

    def shared(self) -> dict:
        """The fields that are the same on every rank."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rollouts"}


def encode(tree: object, name: str = "state") -> tuple[str, dict[str, torch.Tensor]]:
    """`(text, tensors)` of a tree; the tensors are copies on the CPU, keyed by their path.

    Raises:
        TypeError: a value of another type; the message names its path.
    """
    tensors: dict[str, torch.Tensor] = {}

    def walk(value, path):
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().to("cpu", copy=True).contiguous()
            return {"__tensor__": path}
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, list | tuple):
            items = [walk(v, f"{path}.{i}") for i, v in enumerate(value)]
            return {"__tuple__": items} if isinstance(value, tuple) else items
        if isinstance(value, dict):
            if all(isinstance(k, str) and k not in _TAGS for k in value):
                return {k: walk(v, f"{path}.{k}") for k, v in value.items()}
            pairs = [[walk(k, path), walk(v, f"{path}.{k}")] for k, v in value.items()]
            return {"__items__": pairs}
        raise TypeError(
            f"{path}: got {type(value).__name__}, expected dict, list, tuple, tensor, str, int, "
            "float, bool or None; convert it (a NumPy number with .item())"
        )

    return json.dumps(walk(tree, name)), tensors


def decode(text: str, tensors: dict[str, torch.Tensor]) -> object:
    """The tree that `encode` was given; tuples and keys that are not strings included."""

    def walk(value):
        if isinstance(value, list):
            return [walk(v) for v in value]
        if not isinstance(value, dict):
            return value
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        if "__tuple__" in value:
            return tuple(walk(v) for v in value["__tuple__"])
        if "__items__" in value:
            return {walk(k): walk(v) for k, v in value["__items__"]}
        return {k: walk(v) for k, v in value.items()}

    return walk(json.loads(text))


def random_state() -> dict:
    """The states of this process's generators: Python, NumPy, torch, the current CUDA device."""
    kind, keys, *rest = numpy.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Put the generators where `random_state` found them."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.asarray(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def fork_random_state(state: dict, rank: int) -> None:
    """Seed the generators of a rank that the saved run did not have, from another's state."""
    digest = hashlib.sha256(bytes(state["torch"].tolist()) + rank.to_bytes(8, "little")).digest()
    seed = int.from_bytes(digest[:4], "little")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def share(entries: list, rank: int, size: int) -> list:
    """The contiguous part of `entries` for `rank` of `size`; lengths differ by at most one."""
    return entries[len(entries) * rank // size : len(entries) * (rank + 1) // size]
