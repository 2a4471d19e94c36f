"""Where this process stands among the ranks, and collectives over them.

`ranks()` is the only place in the trainer that asks `torch.distributed` for rank or world. Without
a process group it is one rank, and every collective returns its input.

Two pairs of numbers, equal as long as every mesh dimension reads data of its own:

    rank, world             processes: who writes files; `first` speaks for all
    data_rank, data_world   readers of data: for the data stream and the normalisers

A sequence-parallel dimension would stay out of `DATA`: its ranks share one `data_rank`, and
`totals` then needs the group of the dimensions in `DATA`.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DATA = ("replicate", "shard")  # mesh dimensions whose ranks read different rows

_mesh: DeviceMesh | None = None  # of this process, made by `start`

_T = TypeVar("_T")


class FirstRankFailed(ValueError):
    """What rank 0 does for all of them failed there; its own error says why."""


@dataclass(frozen=True)
class Ranks:
    """One process among `world`, and the collectives over them."""

    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None  # None: one process, or a group that `start` did not make
    group: dist.ProcessGroup | None = None  # of the collectives; None = all ranks

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all: prints, and writes what there is once."""
        return self.rank == 0

    def size(self, dimension: str) -> int:
        """Ranks along a dimension of the mesh, 1 where it has none of that name."""
        names = () if self.mesh is None else self.mesh.mesh_dim_names
        return self.mesh.size(names.index(dimension)) if dimension in names else 1

    @property
    def data_world(self) -> int:
        """Number of ranks that read different rows."""
        return self.world if self.mesh is None else math.prod(map(self.size, DATA))

    @property
    def data_rank(self) -> int:
        """The place of this rank among them."""
        if self.mesh is None:
            return self.rank
        place = 0
        for name, at in zip(self.mesh.mesh_dim_names, self.mesh.get_coordinate(), strict=True):
            place = place * self.size(name) + at if name in DATA else place
        return place

    def totals(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks, in fp64. COLLECTIVE; a sync. NaN and infinity spread."""
        if self.world == 1:
            return [float(value) for value in values]
        device = _host_or_cuda() if self.mesh is None else self.mesh.device_type
        summed = torch.tensor(list(values), dtype=torch.float64, device=device)
        dist.all_reduce(summed, group=self.group)
        return summed.tolist()

    def maxima(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over the ranks. COLLECTIVE."""
        if self.world == 1:
            return list(values)
        largest = torch.tensor(list(values), dtype=torch.int64, device=_host_or_cuda())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest.tolist()

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
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), _mesh)


def start(device: str = "auto", replicas: int = 1) -> torch.device:
    """Join the process group of torchrun's environment, or make one of this process alone.

    Makes the mesh of `ranks()` too, see `make_mesh`; a second call keeps the group. Returns the
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


def make_mesh(device: torch.device | str, replicas: int = 1) -> DeviceMesh:
    """All ranks as a mesh: ("shard",), or with `replicas` > 1 ("replicate", "shard") for HSDP.

    Raises ValueError where the number of ranks is not a multiple of `replicas`.
    """
    world, kind = dist.get_world_size(), torch.device(device).type
    if replicas < 1 or world % replicas:
        raise ValueError(f"replicas: got {replicas}, expected a divisor of the {world} ranks")
    if replicas == 1:
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    shape = (replicas, world // replicas)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def sum_shards(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
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


def _host_or_cuda() -> str:
    """The device where the default group can reduce a few numbers: the host if it has gloo."""
    return "cpu" if "gloo" in str(dist.get_backend_config()) else "cuda"
