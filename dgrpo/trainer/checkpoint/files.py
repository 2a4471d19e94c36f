"""The files of a checkpoint: streamed safetensors, the manifest, what proves that all are whole.

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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dgrpo.trainer.checkpoint.errors import CheckpointError, OtherFormat

MANIFEST = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d+)")
_CHUNK = 1 << 24

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype, `"BF16"`; raises TypeError for one that the format lacks."""
    if dtype not in _NAMES:
        raise TypeError(f"dtype: got {dtype}, expected one of {sorted(_NAMES.values())}")
    return _NAMES[dtype]


def folder_name(step: int) -> str:
    """`step-00000012`."""
    return f"step-{step:08d}"


def folder_step(path: Path) -> int | None:
    """The step in a complete checkpoint's name; None for temporary and abandoned ones."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


class _Stream:
    """A file that counts and checksums what is written to it, and names itself in errors."""

    def __init__(self, path: Path):
        self.path, self.bytes, self.crc = path, 0, 0

    def __enter__(self):
        self._file = self._guard(open, self.path, "wb")
        return self

    def _guard(self, call, *args):
        try:
            return call(*args)
        except OSError as error:
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(self.path)) from error

    def write(self, data) -> None:
        self._guard(self._file.write, data)
        self.bytes += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self._guard(self._file.flush)
                self._guard(os.fsync, self._file.fileno())
        finally:
            try:
                self._guard(self._file.close)
            except OSError:
                if kind is None:
                    raise

    def entry(self) -> dict:
        return {"bytes": self.bytes, "crc32": f"{self.crc:08x}"}


Piece = tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]


def write_tensors(path: Path, pieces: Iterable[Piece], metadata: dict[str, str]) -> dict:
    """Writes one safetensors file, a tensor at a time, and flushes it to the disk.

    `pieces` are `(key, dtype, shape, tensor)` with `tensor()` called when its turn comes, so that
    only one is on the host. Returns `{"bytes", "crc32"}`. Raises OSError with the path.
    """
    # Widest dtypes first, as readers want every tensor aligned to its item size.
    pieces = sorted(pieces, key=lambda piece: -piece[1].itemsize)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, dtype, shape, _ in pieces:
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[key] = {
            "dtype": dtype_name(dtype),
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _Stream(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, tensor in pieces:
            flat = tensor().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(flat), _CHUNK):
                stream.write(memoryview(flat[start : start + _CHUNK]))
    return stream.entry()


def write_json(path: Path, value: object) -> dict:
    """Writes JSON and flushes it to the disk; returns `{"bytes", "crc32"}`."""
    with _Stream(path) as stream:
        stream.write(json.dumps(value, indent=1).encode())
    return stream.entry()


def sync_folder(path: Path) -> None:
    """Makes the folder's entries durable: renames and new names in it."""
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
            "go on with the version that wrote it, or start anew in another folder"
        )
    return manifest


def damages(
    folder: Path, names: Iterable[str], files: dict[str, dict], checksums: bool
) -> list[str]:
    """What is wrong with the files: missing, of another size, or (with `checksums`) altered."""

    def damage(name: str) -> str | None:
        path, wanted = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                return f"{path}: {size} bytes, expected {wanted['bytes']}"
            crc = 0
            if checksums:
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
    if not folder.is_dir():
        return []
    return sorted(step for path in folder.iterdir() if (step := folder_step(path)) is not None)


def recover(folder: Path) -> None:
    """Renames a checkpoint whose writer was killed between its manifest and the rename."""
    for path in folder.glob("step-*.tmp") if folder.is_dir() else ():
        final = path.with_suffix("")
        try:
            files = read_manifest(path)["files"]
        except CheckpointError:
            continue
        if not final.exists() and not damages(path, files, files, checksums=True):
            os.rename(path, final)


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, and what kills and resumes left behind.

    A folder is renamed before it is emptied: a kill leaves no half of one under a valid name.
    """
    for step in complete_steps(folder)[:-keep]:
        path = folder / folder_name(step)
        os.rename(path, path.with_suffix(".abandoned"))
    for pattern in ("step-*.abandoned", "step-*.tmp"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Deletes a folder that was not finished; one that resists is left to the next `prune`."""
    shutil.rmtree(path, ignore_errors=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Makes all files in `temporary` durable and puts it in the place of `folder`."""
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


def set_aside(folder: Path, after: int) -> list[int]:
    """Renames the checkpoints later than `after`, for `prune` to remove. Returns their steps."""
    steps = [step for step in complete_steps(folder) if step > after]
    for step in steps:
        path = folder / folder_name(step)
        shutil.rmtree(path.with_suffix(".abandoned"), ignore_errors=True)
        os.rename(path, path.with_suffix(".abandoned"))
    return steps
