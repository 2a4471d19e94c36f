"""The lock on a run's folder: one holder, told by name, and gone with its process."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from dgrpo.trainer.folder import LOCK, FolderInUse, FolderLock

FORK = multiprocessing.get_context("fork")


def hold(folder, ready, fork=False):
    """Holds the folder until killed, perhaps with a child of its own that outlives it."""
    lock = FolderLock(folder)
    child = os.fork() if fork else -1
    if child:
        ready.put(child)
    time.sleep(60)
    lock.release()


def contend(folder, start, found):
    """Tries to hold the folder at the same moment as others."""
    start.wait()
    try:
        lock = FolderLock(folder)
    except FolderInUse as error:
        found.put(str(error))
    else:
        found.put("")
        time.sleep(1)
        lock.release()


def killed_holder(folder, fork=False):
    """Runs `hold` in a process and kills it; the child that it forked, if it did."""
    ready = FORK.Queue()
    process = FORK.Process(target=hold, args=(folder, ready, fork))
    process.start()
    child = ready.get(timeout=20)
    with pytest.raises(FolderInUse):
        FolderLock(folder)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return child


def test_a_second_run_is_told_who_holds_the_folder(tmp_path):
    lock = FolderLock(tmp_path / "new" / "run")
    host, pid = socket.gethostname(), os.getpid()
    with pytest.raises(FolderInUse, match=rf"out: .*\(host {host}, pid {pid}, since 20\d\d-"):
        FolderLock(tmp_path / "new" / "run")
    lock.release()
    lock.release()
    assert (tmp_path / "new/run" / LOCK).read_text() == ""
    again = FolderLock(tmp_path / "new/run")
    assert not again.notes
    again.release()


def test_one_of_those_that_start_together_gets_it(tmp_path):
    start, found = FORK.Barrier(4), FORK.Queue()
    group = [FORK.Process(target=contend, args=(tmp_path, start, found)) for _ in range(4)]
    for process in group:
        process.start()
    told = sorted(found.get(timeout=30) for _ in group)
    for process in group:
        process.join()
    assert told[0] == "" and all(f"host {socket.gethostname()}, pid " in text for text in told[1:])


def test_a_killed_run_leaves_the_folder_free(tmp_path):
    killed_holder(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"]  # what it wrote does not matter
    lock = FolderLock(tmp_path)
    assert not lock.notes
    lock.release()


def test_a_forked_process_does_not_hold_it_on(tmp_path):
    child = killed_holder(tmp_path, fork=True)
    try:
        FolderLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_it_is_freed_with_the_last_reference(tmp_path):
    lock = FolderLock(tmp_path)
    del lock
    FolderLock(tmp_path).release()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    lock = FolderLock(tmp_path)
    assert "has no locks (No locks available)" in lock.notes[0]
    lock.release()


def test_a_holder_on_another_machine_that_did_not_end_is_told(tmp_path):
    (tmp_path / LOCK).write_text('{"host": "elsewhere", "pid": 7, "since": "yesterday"}')
    lock = FolderLock(tmp_path)
    assert "host elsewhere, pid 7, since yesterday" in lock.notes[0]
    assert "may not share locks between machines" in lock.notes[0]
    lock.release()


@pytest.mark.parametrize("text", ["", '{"host": "el', "[1]", "\x00\x00"])
def test_any_lock_file_that_nobody_holds_is_fine(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    lock = FolderLock(tmp_path)
    assert not lock.notes and json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: got '.*file/run', in which nothing can be written"):
        FolderLock(tmp_path / "file" / "run")
