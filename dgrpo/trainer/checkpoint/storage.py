"""The files of one checkpoint: which rank writes and reads which piece of which tensor.

torch.distributed.checkpoint plans that, on any number of ranks. Its own file-system storage pickles
its index; here the index is JSON and the pieces are safetensors, one file per rank:

    index.json                   {tensor: {dtype, shape, pieces: [{offset, shape, file, key}]}}
    tensors-00000.safetensors    the pieces that rank 0 wrote
    rank-00000.safetensors       rank 0's random numbers and rollouts, and what all ranks share
    manifest.json                size and checksum of every file; written last
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from dgrpo.trainer.checkpoint import files
from dgrpo.trainer.checkpoint.errors import CheckpointError

INDEX = "index.json"
# By rank: the pieces that it wrote, and its own state.
TENSORS, STATE = "tensors-{:05d}.safetensors", "rank-{:05d}.safetensors"


def piece_key(item: WriteItem) -> str:
    """The name of a planned piece in its file: that of its tensor, and its offsets."""
    return item.index.fqn + "@" + ",".join(map(str, item.tensor_data.chunk.offsets))


def write_rank(
    folder: Path, rank: int, state: tuple[str, dict[str, Tensor]], pieces: dict[str, Tensor]
) -> dict[str, dict]:
    """Write a rank's two files: its state as `encode` made it, its pieces by their keys.

    Returns the manifest's entry of each file.
    """
    text, tensors = state
    wanted = {STATE.format(rank): (tensors, {"state": text})}
    if pieces:
        wanted[TENSORS.format(rank)] = (pieces, {"format": "pt"})
    return {name: files.write_tensors(folder / name, *what) for name, what in wanted.items()}


def publish(temporary: Path, step: int, plans: Sequence[SavePlan], listed: dict[str, dict]) -> None:
    """Write index and manifest, then rename `folder.tmp` to `folder`. On rank 0 alone.

    `plans` say what each rank wrote, `listed` has the manifest's entries of its files.
    """
    unseen = [name for name in listed if not (temporary / name).exists()]
    if unseen:
        raise CheckpointError(
            f"{temporary / unseen[0]}: another rank wrote it, rank 0 does not see it; "
            "the run folder must lie on a file system that all nodes share"
        )
    index: dict[str, dict] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            whole, piece = item.tensor_data, item.tensor_data.chunk
            dtype = files.dtype_name(whole.properties.dtype)
            entry = {"dtype": dtype, "shape": list(whole.size), "pieces": []}
            place = {"file": TENSORS.format(rank), "key": piece_key(item)}
            index.setdefault(item.index.fqn, entry)["pieces"].append(
                {"offset": list(piece.offsets), "shape": list(piece.sizes), **place}
            )
    listed = {**listed, INDEX: files.write_json(temporary / INDEX, index)}
    manifest = {
        "format": files.FORMAT,
        "step": step,
        "world_size": len(plans),
        "files": dict(sorted(listed.items())),
    }
    files.write_json(temporary / files.MANIFEST, manifest)
    files.sync_folder(temporary)
    folder = temporary.with_suffix("")
    if folder.exists():
        complete = files.complete_steps(folder.parent)
        files.set_aside(folder.parent, [other for other in complete if other >= step])
    os.rename(temporary, folder)
    files.sync_folder(folder.parent)


def read_index(folder: Path) -> Metadata:
    """The index as torch.distributed.checkpoint knows it; (file, key) of each piece beside it."""
    tensors, places = {}, {}
    for fqn, entry in json.loads((folder / INDEX).read_text()).items():
        chunks = []
        for piece in entry["pieces"]:
            offset = torch.Size(piece["offset"])
            chunks.append(ChunkStorageMetadata(offset, torch.Size(piece["shape"])))
            places[MetadataIndex(fqn, offset)] = (piece["file"], piece["key"])
        properties = TensorProperties(dtype=files.DTYPES[entry["dtype"]])
        tensors[fqn] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(tensors, storage_data=places)


def read_tensors(folder: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    """Load `tensors` in place: of each piece only the part that this rank needs."""
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(tensors, metadata)
    by_file: dict[str, list] = {}
    for item in planner.create_local_plan().items:
        file, key = metadata.storage_data[item.storage_index]
        by_file.setdefault(file, []).append((key, item))
    for file, items in by_file.items():
        with safe_open(folder / file, framework="pt") as handle:
            for key, item in items:
                if len(item.lengths):
                    pairs = zip(item.storage_offsets, item.lengths, strict=True)
                    part = tuple(slice(start, start + length) for start, length in pairs)
                    value = handle.get_slice(key)[part]
                else:
                    value = handle.get_tensor(key)
                planner.resolve_tensor(item).detach().copy_(value)


def read_rank(folder: Path, rank: int) -> tuple[str, dict[str, Tensor]]:
    """A rank's own state as `encode` made it."""
    with safe_open(folder / STATE.format(rank), framework="pt") as handle:
        return handle.metadata()["state"], {key: handle.get_tensor(key) for key in handle.keys()}
