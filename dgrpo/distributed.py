"""Where this process stands among the ranks, and collectives over them.

`rank` and `world` count processes; `data_rank` and `data_world` count those that read different
rows. Without a process group there is one rank, and every collective returns its input.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_mesh: dist.DeviceMesh | None = None  # of this process, made by `start`

_T = TypeVar("_T")


class FirstRankFailed(ValueError):
    """What rank 0 does for all of them failed there; its own error says why."""


@dataclass(frozen=True)
class Ranks:
    """One process among `world`, and the collectives over them."""

    rank: int = 0
    world: int = 1
    mesh: dist.DeviceMesh | None = None  # None: one process, or a group that `start` did not make
    group: dist.ProcessGroup | None = None  # of the collectives; None = all ranks

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all: prints, and writes what there is once."""
        return self.rank == 0

    @property
    def data_world(self) -> int:
        """Number of ranks that read different rows: all, as no mesh dimension shares rows."""
        return self.world

    @property
    def data_rank(self) -> int:
        """The place of this rank among them."""
        return self.rank

    def totals(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks, in fp64. COLLECTIVE; a sync. NaN and infinity spread."""
        return self._reduced([float(value) for value in values], torch.float64, "SUM")

    def maxima(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over the ranks. COLLECTIVE."""
        return self._reduced(list(values), torch.int64, "MAX")

    def _reduced(self, values: list, dtype: torch.dtype, op: str) -> list:
        if self.world == 1:
            return values
        # On the host if the group has gloo, which spares the GPU a sync.
        device = "cpu" if "gloo" in str(dist.get_backend_config(self.group)) else "cuda"
        reduced = torch.tensor(values, dtype=dtype, device=device)
        dist.all_reduce(reduced, getattr(dist.ReduceOp, op), self.group)
        return reduced.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, in rank order. COLLECTIVE."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def only_first(self, call: Callable[[], _T]) -> _T | None:
        """`call()` on rank 0, None elsewhere. COLLECTIVE.

        Where it raises on rank 0, the other ranks raise `FirstRankFailed`.
        """
        value, error = None, None
        if self.first:
            try:
                value = call()
            except Exception as caught:
                error = caught
        if self.world > 1:
            told = [None if error is None else str(error)]
            dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
            if not self.first and told[0] is not None:
                raise FirstRankFailed(told[0])
        if error is not None:
            raise error
        return value

    def apart(self, timeout: timedelta) -> Ranks:
        """The same ranks with a gloo group of their own, for a thread's collectives. COLLECTIVE."""
        if self.world == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timeout))


def ranks() -> Ranks:
    """This process's place among the ranks."""
    started = dist.is_available() and dist.is_initialized()
    return Ranks(*place_in(None), _mesh) if started else Ranks()


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in a group and the group's size. None: the group of all ranks."""
    return dist.get_rank(group), dist.get_world_size(group)


def start(device: str = "auto", replicas: int = 1) -> torch.device:
    """Join the process group of torchrun's environment, or make one of this process alone.

    Also makes the mesh of `ranks()`, see `make_mesh`; a second call keeps the group. Returns the
    device of this rank: `device` is "cpu", "cuda" or "auto" (a GPU where there is one). Raises
    ValueError where there is no such device, or `replicas` do not divide the ranks.
    """
    global _mesh
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, expected 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch finds no GPU; expected 'auto' or 'cpu'")
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    here = torch.device("cpu")
    if cuda:
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, **alone)
    _mesh = make_mesh(here, replicas)
    return here


def make_mesh(device: torch.device | str, replicas: int = 1) -> dist.DeviceMesh:
    """All ranks as a mesh: ("shard",), or with `replicas` > 1 ("replicate", "shard") for HSDP.

    Raises ValueError where the number of ranks is not a multiple of `replicas`.
    """
    world, kind = dist.get_world_size(), torch.device(device).type
    if replicas < 1 or world % replicas:
        raise ValueError(f"replicas: got {replicas}, expected a divisor of the {world} ranks")
    if replicas == 1:
        return dist.init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    shape = (replicas, world // replicas)
    return dist.init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def sum_shards(tensor: Tensor, mesh: dist.DeviceMesh) -> Tensor:
    """Sum a tensor over the ranks that hold one sharded copy, in place. COLLECTIVE."""
    dist.all_reduce(tensor, group=mesh.get_group(mesh.ndim - 1))
    return tensor


def leave() -> None:
    """End this process's part in torch.distributed, where it has one.

    Call it when nothing holds a sharded model: its groups' threads abort a process that ends first.
    """
    global _mesh
    _mesh = None
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # models are held by cycles of references
        dist.destroy_process_group()
