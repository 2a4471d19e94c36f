"""One run at a time in a folder: a lock that the kernel releases with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from datetime import datetime
from pathlib import Path

NAME = "run.lock"
# What flock answers where the file system has no locks (such as Lustre mounted without `flock`).
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


class FolderInUse(ValueError):
    """Another run holds the folder."""


class FolderLock:
    """Holds a run's folder for this process, until `release` or its end, however that comes.

    flock(2) on `run.lock`; NFS passes it on to its server. The file stays, and is empty while no
    run holds it: removing it would let two runs hold two files of one name.

    Args:
        folder: of the run; made where it is missing.

    Attributes:
        notes: what to tell where the lock may not be worth much on this file system.

    Raises:
        FolderInUse: another run holds the folder; says which.
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.notes: list[str] = []
        path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(
                f"out: got {str(folder)!r}, in which nothing can be written ({error.strerror}: "
                f"{error.filename}); expected a folder for this run"
            ) from error
        try:
            self._hold(folder)
        except BaseException:
            self._close()
            raise
        _held.add(self)

    def _hold(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(
                f"out: got {str(folder)!r}, in which another run is under way ({self._holder()}); "
                "wait for it, stop it, or set another out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.notes.append(
                f"the file system of {folder} has no locks ({error.strerror}): see to it that no "
                "second run uses this folder"
            )
        last = self._read()
        if last.get("host", socket.gethostname()) != socket.gethostname():
            self.notes.append(
                f"{folder} was last held by a run that did not end by itself ({_words(last)}); "
                "this file system may not share locks between machines: if that run is still "
                "alive, stop one of the two"
            )
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)

    def _holder(self) -> str:
        """Who holds the lock; it writes that down just after it has the lock."""
        for _ in range(20):
            if found := self._read():
                return _words(found)
            time.sleep(0.05)
        return "it has just begun"

    def _read(self) -> dict:
        try:
            found = json.loads(os.pread(self._file, 4096, 0) or b"{}")
        except ValueError:  # half written
            return {}
        return found if isinstance(found, dict) else {}

    def release(self) -> None:
        """Lets go of the folder; may be called again."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.release()


def _words(holder: dict) -> str:
    return ", ".join(f"{name} {holder.get(name, '?')}" for name in ("host", "pid")) + (
        f", since {holder.get('since', '?')}"
    )


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A forked process must not hold the lock on when the run is gone; its parent still does."""
    for lock in list(_held):
        lock._close()


os.register_at_fork(after_in_child=_let_go_in_child)
