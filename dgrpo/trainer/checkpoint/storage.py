"""torch.distributed.checkpoint over safetensors and JSON: the writer and the reader of one folder.

DCP plans who writes and reads which piece of which tensor, on any number of ranks, and carries an
error on one rank to all. Its own file-system storage pickles its index; here the index is JSON and
the pieces are safetensors, a file a rank:

    index.json                   {tensor: {dtype, shape, pieces: [{offset, shape, file, key}]}}
    tensors-00000.safetensors    the pieces that rank 0 wrote
    rank-00000.safetensors       rank 0's random numbers and rollouts, and what all ranks share
    manifest.json                size and checksum of every file; written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dgrpo.trainer.checkpoint import files
from dgrpo.trainer.checkpoint.errors import CheckpointError

INDEX = "index.json"


def tensors_file(rank: int) -> str:
    """The file of the pieces that a rank wrote."""
    return f"tensors-{rank:05d}.safetensors"


def rank_file(rank: int) -> str:
    """The file of a rank's own state."""
    return f"rank-{rank:05d}.safetensors"


def _done(value: object) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


@dataclass(frozen=True)
class _Written:
    """One piece of a tensor (`key` set) or one whole file (`key` empty), as a rank reports it."""

    file: str
    key: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    entry: dict | None = None


class Writer(StorageWriter):
    """Writes `folder` by way of `folder.tmp`, which `finish` renames once all is on the disk.

    `state` is this rank's `(text, tensors)` of `encode`. `error` is what went wrong here before
    writing began: raised inside DCP's protocol, it reaches every rank instead of leaving the others
    waiting. `committed` runs on the coordinator after the rename.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        rank: int,
        world_size: int,
        state: tuple[str, dict[str, torch.Tensor]],
        error: BaseException | None,
        committed: Callable[[], None],
    ):
        self.folder, self.temporary = folder, folder.with_name(folder.name + ".tmp")
        self.step, self.rank, self.world_size = step, rank, world_size
        self.state, self.error, self.committed = state, error, committed

    def reset(self, checkpoint_id=None) -> None:
        """DCP's hook for a new identifier; this writer is made for one folder."""

    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None:
        """Makes the temporary folder on the coordinator, before any rank writes."""
        if self.error is not None:
            raise self.error
        if is_coordinator:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leaves the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leaves the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's two files; one result a piece and one a file."""
        text, tensors = self.state
        name = rank_file(self.rank)
        pieces = [(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in tensors.items()]
        entry = files.write_tensors(self.temporary / name, pieces, {"state": text})
        results = [_result(MetadataIndex(name), _Written(name, entry=entry))]

        name, pieces = tensors_file(self.rank), []
        for item in plan.items:
            chunk, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
            key = item.index.fqn + "@" + ",".join(map(str, chunk.offsets))
            shape = tuple(chunk.sizes)
            pieces.append((key, dtype, shape, lambda item=item: planner.resolve_data(item)))
            written = _Written(name, key, files.dtype_name(dtype), shape)
            results.append(_result(MetadataIndex(item.index.fqn, chunk.offsets), written))
        if pieces:
            entry = files.write_tensors(self.temporary / name, pieces, {"format": "pt"})
            results.append(_result(MetadataIndex(name), _Written(name, entry=entry)))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: index, manifest, and the rename that makes the checkpoint current."""
        tensors: dict[str, dict] = {}
        listed: dict[str, dict] = {}
        for result in (result for rank in results for result in rank):
            written: _Written = result.storage_data
            if written.entry is not None:
                listed[written.file] = written.entry
                continue
            fqn, offset = result.index.fqn, list(result.index.offset)
            shape = list(metadata.state_dict_metadata[fqn].size)
            tensor = tensors.setdefault(fqn, {"dtype": written.dtype, "shape": shape, "pieces": []})
            tensor["pieces"].append(
                {
                    "offset": offset,
                    "shape": list(written.shape),
                    "file": written.file,
                    "key": written.key,
                }
            )
        unseen = [name for name in listed if not (self.temporary / name).exists()]
        if unseen:
            raise CheckpointError(
                f"{self.temporary / unseen[0]}: another rank wrote it, rank 0 does not see it; "
                "the run folder must lie on a file system that all nodes share"
            )
        listed[INDEX] = files.write_json(self.temporary / INDEX, tensors)
        manifest = {
            "format": files.FORMAT,
            "step": self.step,
            "world_size": self.world_size,
            "files": dict(sorted(listed.items())),
        }
        files.write_json(self.temporary / files.MANIFEST, manifest)
        files.sync_folder(self.temporary)
        if self.folder.exists():
            files.set_aside(self.folder.parent, after=self.step - 1)
        os.rename(self.temporary, self.folder)
        files.sync_folder(self.folder.parent)
        self.committed()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        """True: the folder is given to the constructor."""
        return True


def _result(index: MetadataIndex, written: _Written) -> WriteResult:
    size = written.entry["bytes"] if written.entry else 0
    return WriteResult(index=index, size_in_bytes=size, storage_data=written)


class Reader(StorageReader):
    """Reads the pieces that this rank needs, and of each piece only the part that it needs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index: dict[str, dict] = json.loads((folder / INDEX).read_text())

    def saved(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """The dtype and the whole shape of every saved tensor."""
        return {
            fqn: (files.DTYPES[entry["dtype"]], torch.Size(entry["shape"]))
            for fqn, entry in self.index.items()
        }

    def reset(self, checkpoint_id=None) -> None:
        """DCP's hook for a new identifier; this reader is made for one folder."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """DCP's view of the index."""
        tensors, places = {}, {}
        for fqn, (dtype, shape) in self.saved().items():
            chunks = []
            for piece in self.index[fqn]["pieces"]:
                offset = torch.Size(piece["offset"])
                chunks.append(ChunkStorageMetadata(offset, torch.Size(piece["shape"])))
                places[MetadataIndex(fqn, offset)] = (piece["file"], piece["key"])
            tensors[fqn] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args, **kwargs
    ) -> None:
        """Keeps where every piece lies."""
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leaves the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leaves the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies every wanted slice into its tensor, a file at a time."""
        by_file: dict[str, list] = {}
        for item in plan.items:
            file, key = self.places[item.storage_index]
            by_file.setdefault(file, []).append((key, item))
        for file, items in by_file.items():
            with safe_open(self.folder / file, framework="pt") as handle:
                for key, item in items:
                    if len(item.lengths):
                        pairs = zip(item.storage_offsets, item.lengths, strict=True)
                        part = tuple(slice(start, start + length) for start, length in pairs)
                        value = handle.get_slice(key)[part]
                    else:
                        value = handle.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(value)
                    planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        """True: the folder is given to the constructor."""
        return True


def read_rank(folder: Path, rank: int) -> tuple[str, dict[str, torch.Tensor]]:
    """A rank's own state as `encode` made it."""
    with safe_open(folder / rank_file(rank), framework="pt") as handle:
        return handle.metadata()["state"], {key: handle.get_tensor(key) for key in handle.keys()}
