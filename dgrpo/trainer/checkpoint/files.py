"""The files of a checkpoint, and the manifest that shows damage.

    tensors-00000-00000.safetensors  rank 0's tensors, for torch's HuggingFaceStorageReader
    rank-00000.json                  its random numbers and rollouts, and what all ranks share
    manifest.json                    size and CRC-32 of every file; written last

A folder `step-00000012` appears by one rename after every file in it has reached the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dgrpo.trainer.checkpoint.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 3
PART = 2**31  # most bytes of tensors in a file, and in host memory while it is written
_CHUNK = 1 << 24


def folder_name(step: int) -> str:
    """`step-00000012`."""
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """The file of a rank's own state."""
    return f"rank-{rank:05d}.json"


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict:
    """Write a safetensors file and flush it to the disk; returns `measured` of it."""
    return _write(path, lambda: save_file(tensors, path, metadata))


def write_text(path: Path, text: str) -> dict:
    """Write a text and flush it to the disk; returns `measured` of it."""
    return _write(path, lambda: path.write_text(text, encoding="utf-8"))


def _write(path: Path, save: Callable[[], object]) -> dict:
    try:
        save()
        sync(path)
    except (OSError, SafetensorError) as error:  # neither names the file
        raise OSError(f"{path}: cannot write: {error}") from error
    return measured(path)


def in_parts(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of one file after the other, copied to the host and freed before the next."""
    held, size = {}, 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > PART:
            yield held
            held.clear()
            size = 0
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    if held:
        yield held


def write_rank(
    folder: Path, rank: int, state: str, pieces: dict[str, tuple[torch.Tensor, list[int]]]
) -> dict[str, dict]:
    """Write a rank's files; returns the manifest's entry of each.

    `pieces` are by the names of their tensors, with the offsets at which they begin in these.
    """
    listed = {rank_file(rank): write_text(folder / rank_file(rank), state)}
    for number, held in enumerate(in_parts((name, it) for name, (it, _) in pieces.items())):
        places = {name: {"saved_offsets": pieces[name][1]} for name in held}
        path = folder / f"tensors-{rank:05d}-{number:05d}.safetensors"
        listed[path.name] = write_tensors(path, held, {"DCP_SHARDING_INFO": json.dumps(places)})
    return listed


def publish(temporary: Path, step: int, listed: dict[str, dict]) -> None:
    """Write the manifest of all ranks' files, then rename `folder.tmp` to `folder`. On rank 0."""
    unseen = [name for name in listed if not (temporary / name).exists()]
    if unseen:
        raise CheckpointError(
            f"{temporary / unseen[0]}: another rank wrote it, rank 0 does not see it; "
            "the run folder must lie on a file system that all nodes share"
        )
    manifest = {"format": FORMAT, "files": dict(sorted(listed.items()))}
    write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))
    sync(temporary)
    folder = temporary.with_suffix("")
    if folder.exists():
        complete = complete_steps(folder.parent)
        set_aside(folder.parent, [other for other in complete if other >= step])
    os.rename(temporary, folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Make a file's contents durable, or a folder's entries: renames and new names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def measured(path: Path) -> dict:
    """The size and CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            crc = zlib.crc32(data, crc)
        return {"bytes": file.tell(), "crc32": f"{crc:08x}"}


def damages(folder: Path, rank: int = 0, world: int = 1) -> list[str]:
    """What is wrong with a checkpoint, by file: missing, truncated, altered.

    Of `world` ranks, each checks its share of the files.

    Raises:
        CheckpointError: it is of another version of dgrpo, whatever else stands in it.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        listed = manifest["files"] if version == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path}: unreadable ({error})"]
    if version != FORMAT:
        raise CheckpointError(
            f"{folder}: written in format {version}, this version of dgrpo reads format {FORMAT}; "
            "go on with the version that wrote it, or start again in another folder"
        )

    def damage(name: str) -> str | None:
        try:
            found, wanted = measured(folder / name), listed[name]
        except OSError as error:
            return f"{folder / name}: {error.strerror}"
        if found == wanted:
            return None
        both = (f"{it['bytes']} bytes with CRC-32 {it['crc32']}" for it in (found, wanted))
        return f"{folder / name}: got {', expected '.join(both)}"

    with ThreadPoolExecutor(4) as pool:
        return [text for text in pool.map(damage, sorted(listed)[rank::world]) if text]


def complete_steps(folder: Path) -> list[int]:
    """The steps, ascending, whose folder is in place. Loading checks what is in it."""
    return sorted(int(path.name[5:]) for path in folder.glob("step-" + 8 * "[0-9]"))


def recover(folder: Path) -> None:
    """Rename a checkpoint whose writer was killed between its manifest and the rename."""
    for path in folder.glob("step-*.tmp"):
        final = path.with_suffix("")
        if not final.exists() and not damages(path):
            os.rename(path, final)


def set_aside(folder: Path, steps: Iterable[int]) -> None:
    """Rename checkpoints, for `prune` to delete: a kill leaves no half of one under its name."""
    for step in steps:
        path = folder / folder_name(step)
        abandoned = path.with_suffix(".abandoned")
        shutil.rmtree(abandoned, ignore_errors=True)
        os.rename(path, abandoned)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what kills and resumes left behind."""
    set_aside(folder, complete_steps(folder)[:-keep])
    for pattern in ("step-*.abandoned", "step-*.tmp"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Make all files in `temporary` durable and replace `folder` by it."""
    for path in [*filter(Path.is_file, temporary.iterdir()), temporary]:
        sync(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
