"""What a checkpoint holds besides parameters and optimiser state, as JSON. Nothing is pickled."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from dataclasses import dataclass, field

import numpy
import torch
from safetensors import torch as safetensors


@dataclass
class RunState:
    """Where a run stands, besides its parameters, optimisers and random numbers.

    All fields but `rollouts` are the same on every rank; rank 0's are kept. `data` and an entry of
    `rollouts` are trees as `encode` takes them.
    """

    step: int = 0  # optimiser steps finished
    data: dict = field(default_factory=dict)  # the position in the data
    skipped: int = 0  # steps in all whose loss or gradient was not finite
    skipped_in_row: int = 0  # how many of them are the latest ones
    average: float | None = None  # the moving average of the metric of `until`
    pending: int = 0  # batches that the rollouts in flight belong to
    rollouts: list = field(default_factory=list)  # in flight on this rank; an entry stays whole


def encode(tree: object) -> str:
    """JSON of a tree of dict, list, tensor, str, int, float, bool and None; floats stay exact.

    Keys are strings; a tuple comes back as a list, a tensor on the CPU.

    Raises:
        TypeError: a value of another type.
    """

    def other(value: object) -> dict[str, str]:
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise TypeError(f"state: got {value!r:.80} of type {kind}, expected JSON or a tensor")
        data = safetensors.save({"": value.detach().contiguous()})
        return {"__tensor__": base64.b64encode(data).decode()}

    return json.dumps(tree, default=other)


def decode(text: str) -> dict:
    """The tree that `encode` wrote."""

    def tensor_or_dict(found: dict) -> object:
        data = found.get("__tensor__")
        return found if data is None else safetensors.load(base64.b64decode(data))[""]

    return json.loads(text, object_hook=tensor_or_dict)


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
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(state["numpy"])
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
