"""A run's folder: held by one run at a time, and trained with the same settings as before.

    run.lock         held while a run is under way
    settings.yaml    of the stretch that trained last: a start that does not train leaves it alone
    history/         one file for each stretch that trained, by date and by the step it went on from
    done.yaml        a copy of settings.yaml, once the run has finished

A stretch is what one start of the run trained.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from dgrpo.extras import whole_file
from dgrpo.trainer.checkpoint import files
from dgrpo.trainer.config import RunSettings, dump, load
from dgrpo.trainer.config.run import DONE, EVALUATION, METRICS, SETTINGS

LOCK, CHECKPOINTS, HISTORY = "run.lock", "checkpoints", "history"
# What flock answers where the file system has no locks (such as Lustre mounted without `flock`).
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
# What is trained. A change of these makes the metrics of a folder those of two different runs.
TRAINED = ("method", "teacher", "data", "model", "seed")
COMPUTED = {  # fields of these groups that only say how or where it is computed
    "model.checkpointing",
    "model.liger",
    "model.trust_remote_code",
    "teacher.offload_body",
    "teacher.host_above",
    "teacher.url",
    "teacher.key_variable",
    "teacher.timeout",
    "teacher.trust_remote_code",
}
_LONGEST = 120  # characters of a value in a message


class FolderInUse(ValueError):
    """Another run holds the folder."""


class FolderLock:
    """Holds a run's folder for this process, until `release` or its end, however that comes.

    flock(2) on `run.lock`; NFS passes it on to its server. The file stays, and is empty while no
    run holds it: removing it would let two runs hold two files of one name. `notes` warn where the
    file system may make the lock unreliable.

    Raises:
        FolderInUse: another run holds the folder; says which.
        ValueError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path):
        self.notes: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / LOCK, "a+b", buffering=0)
        except OSError as error:
            raise ValueError(
                f"out: got {str(folder)!r}, in which nothing can be written ({error.strerror}: "
                f"{error.filename}); expected a folder for this run"
            ) from error
        try:
            self._hold(folder)
        except BaseException:
            self._file.close()
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
        host, last = socket.gethostname(), self._read()
        if last.get("host", host) != host:
            self.notes.append(
                f"{folder} was last held by a run that did not end by itself ({_words(last)}); "
                "this file system may not share locks between machines: if that run is still "
                "alive, stop one of the two"
            )
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        self._file.truncate(0)
        self._file.write(json.dumps({"host": host, "pid": os.getpid(), "since": since}).encode())

    def _holder(self) -> str:
        """Who holds the lock; it writes that down just after it has the lock."""
        for _ in range(20):
            if found := self._read():
                return _words(found)
            time.sleep(0.05)
        return "it has just begun"

    def _read(self) -> dict:
        self._file.seek(0)
        try:
            found = json.loads(self._file.read() or b"{}")
        except ValueError:  # half written
            return {}
        return found if isinstance(found, dict) else {}

    def release(self) -> None:
        """Release the folder; may be called again."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._file.truncate(0)
            self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.release()


def _words(holder: dict) -> str:
    host, pid, since = (holder.get(name, "?") for name in ("host", "pid", "since"))
    return f"host {host}, pid {pid}, since {since}"


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _release_in_child() -> None:
    """A forked process must not hold the lock on when the run is gone; its parent still does."""
    for lock in list(_held):
        lock._file.close()


os.register_at_fork(after_in_child=_release_in_child)


class Change(NamedTuple):
    """A setting that differs."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        before, after = (
            text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
            for text in map(str, self[1:])
        )
        return f"{self.name}: {before} -> {after}"


def differences(before: Any, after: Any, name: str = "") -> list[Change]:
    """Where two trees of settings differ; in lists of the same length entry by entry."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(key, before.get(key), after.get(key)) for key in {**before, **after}]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(str(place), *pair) for place, pair in enumerate(zip(before, after, strict=True))]
    else:
        # 1 and True, or 1 and 1.0, are not the same setting in words, but they are in effect.
        return [] if before == after else [Change(name, before, after)]
    return [
        change
        for key, old, new in pairs
        for change in differences(old, new, f"{name}.{key}" if name else key)
    ]


def last_step(folder: Path) -> int:
    """The last step that a folder's metrics or checkpoints tell of; 0 without any."""
    steps = [int(line["step"]) for line in last_lines(folder)]
    return max([*files.complete_steps(folder / CHECKPOINTS), *steps], default=0)


def last_lines(folder: Path) -> list[dict[str, Any]]:
    """The last two lines of a folder's metrics, without an unfinished one."""
    path, found = folder / METRICS, []
    for line in path.read_bytes().splitlines()[-2:] if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "step" in line]


def finished(settings: RunSettings) -> bool:
    """Whether the run of this folder finished with exactly these settings."""
    done = Path(settings.out) / DONE
    return done.exists() and not _since(done, settings)


def _since(path: Path, settings: RunSettings) -> list[Change]:
    """How settings differ from those of a file of the folder."""
    try:
        before = load(path)[""]
    except ValueError as error:  # damaged, or of another version
        raise ValueError(f"out: {path} cannot be read; set another out\n{error}") from error
    return differences(before.model_dump(), settings.model_dump())


class History:
    """The settings of one start of a run, beside those that its folder was trained with.

    Attributes:
        changes: to the settings of the last stretch that trained; none where none did.
        trained: the folder's last step before this start.
        lock: that of a start that trains; None of one that only compares.
    """

    @classmethod
    def hold(cls, settings: RunSettings, allow_changes: bool) -> Self:
        """Take hold of the run's folder; without `allow_changes` `check` it too."""
        lock = FolderLock(Path(settings.out))
        try:
            history = cls(settings, lock)
            if not allow_changes:
                history.check()
        except BaseException:
            lock.release()
            raise
        return history

    def __init__(self, settings: RunSettings, lock: FolderLock | None = None):
        self.lock = lock
        self.settings, self.folder = settings, Path(settings.out)
        self.trained, self.kept = last_step(self.folder), False
        path = self.folder / SETTINGS
        self.changes = _since(path, settings) if path.exists() else []

    def check(self) -> None:
        """Raise ValueError where what is trained is not what the folder was trained with."""
        teaches = self.settings.method.teaches()  # an unused teacher may change
        found = []
        for change in self.changes:
            group = change.name.partition(".")[0]
            trained = group in TRAINED and change.name not in COMPUTED
            if trained and (teaches or group != "teacher"):
                found.append(str(change))
        if found and self.trained:
            raise ValueError(
                f"out: got {str(self.folder)!r}, which holds {self.trained} steps trained with "
                f"other settings: {'; '.join(found)}; expected the same ones; set another out for "
                "a run of its own, or go on with the changes by --allow-changes"
            )

    def begin(self) -> None:
        """Write settings.yaml, unless it is that of a stretch that trained."""
        if self.trained:
            return
        if self.changes and self.settings.resume:
            # Scores from before the first step are of other settings, and all there is.
            (self.folder / METRICS).unlink(missing_ok=True)
            shutil.rmtree(self.folder / EVALUATION, ignore_errors=True)
        self.changes = []
        write(self.folder / SETTINGS, dump(self.settings))

    def keep(self, step: int) -> None:
        """Keep these settings as those of a stretch that has trained on from `step`."""
        if self.kept:
            return
        self.kept, text, current = True, dump(self.settings), self.folder / SETTINGS
        folder = self.folder / HISTORY
        folder.mkdir(exist_ok=True)
        write(folder / f"{datetime.now():%Y-%m-%dT%H-%M-%S}-from-step-{step:08d}.yaml", text)
        write(current, text)
        (self.folder / DONE).unlink(missing_ok=True)  # there are steps after that end

    def end(self) -> None:
        """Note that the run finished, with the settings that trained it."""
        write(self.folder / DONE, (self.folder / SETTINGS).read_text())


def write(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text)
