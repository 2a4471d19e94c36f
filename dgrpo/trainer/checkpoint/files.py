"""The files of a checkpoint: streamed safetensors, and the manifest that shows damage.

A folder `step-00000012` appears by one rename after every file in it, the manifest last, has
reached the disk. The manifest lists each file's size and CRC-32, so a missing, short or altered
file is found by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dgrpo.trainer.checkpoint.errors import CheckpointError, OtherFormat

MANIFEST = "manifest.json"
FORMAT = 2
_STEP = re.compile(r"step-(\d+)")
_CHUNK = 1 << 24

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # by safetensors' names
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype, such as `"BF16"`; TypeError where it has none."""
    if dtype not in _NAMES:
        raise TypeError(f"dtype: got {dtype}, expected one of {sorted(_NAMES.values())}")
    return _NAMES[dtype]


def folder_name(step: int) -> str:
    """`step-00000012`."""
    return f"step-{step:08d}"


def _write(path: Path, chunks: Iterable) -> dict:
    """Write bytes to a file and flush it to the disk; its size and CRC-32. OSErrors name it."""
    size = crc = 0
    try:
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # that of a write does not name the file
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    return {"bytes": size, "crc32": f"{crc:08x}"}


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> dict:
    """Write one safetensors file and flush it to the disk; returns `{"bytes", "crc32"}`.

    Unlike safetensors' own writer, it copies one tensor at a time from the GPU.
    """
    # Widest dtypes first, as readers want every tensor aligned to its item size.
    ordered = sorted(tensors.items(), key=lambda pair: -pair[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(flat), _CHUNK):
                yield memoryview(flat[start : start + _CHUNK])

    return _write(path, chunks())


def write_json(path: Path, value: object) -> dict:
    """Write JSON and flush it to the disk; returns `{"bytes", "crc32"}`."""
    return _write(path, [json.dumps(value, indent=1).encode()])


def sync_folder(path: Path) -> None:
    """Make the folder's entries durable: renames and new names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint.

    Raises:
        OtherFormat: of another version of dgrpo, whatever else stands in it.
        CheckpointError: missing or unreadable.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        if version == FORMAT:
            _ = manifest["step"], manifest["world_size"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error
    if version != FORMAT:
        raise OtherFormat(
            f"{folder}: written in format {version}, this version of dgrpo reads format {FORMAT}; "
            "go on with the version that wrote it, or start again in another folder"
        )
    return manifest


def damages(folder: Path, names: Iterable[str], files: dict[str, dict]) -> list[str]:
    """What is wrong with the files: missing, of another size, or altered."""

    def damage(name: str) -> str | None:
        path, wanted = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                return f"{path}: {size} bytes, expected {wanted['bytes']}"
            crc = 0
            with path.open("rb") as file:
                while data := file.read(_CHUNK):
                    crc = zlib.crc32(data, crc)
            if f"{crc:08x}" != wanted["crc32"]:
                return f"{path}: its contents do not match their checksum"
        except FileNotFoundError:
            return f"{path}: missing"
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None

    with ThreadPoolExecutor(4) as pool:
        return [text for text in pool.map(damage, names) if text]


def complete_steps(folder: Path) -> list[int]:
    """The steps, ascending, whose folder is in place. Loading checks what is in it."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match.group(1)) for name in names if (match := _STEP.fullmatch(name)))


def recover(folder: Path) -> None:
    """Rename a checkpoint whose writer was killed between its manifest and the rename."""
    for path in folder.glob("step-*.tmp") if folder.is_dir() else ():
        final = path.with_suffix("")
        try:
            files = read_manifest(path)["files"]
        except CheckpointError:
            continue
        if not final.exists() and not damages(path, files, files):
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
    for path in temporary.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(temporary)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
