"""The command line under SIGINT, SIGTERM and SIGHUP: status, message, checkpoint; no traceback."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgrpo.cli import main
from dgrpo.trainer import train
from dgrpo.trainer.config import dump
from dgrpo.trainer.signals import ENDING
from tests.trainer.home import make_home, settings  # noqa: F401
from tests.trainer.test_stopping import WHEN, newest, rung

ROOT = Path(__file__).parents[2]
HERE = __name__


def endless(prompts, completions, **columns):
    """A reward that never comes back."""
    Path(os.environ["DGRPO_TEST_MARK"]).write_text("")
    time.sleep(120)


def slow_rows(path, mark):
    """Rows that take a while to load."""
    Path(mark).write_text("")
    time.sleep(60)


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported the trainer already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dgrpo.trainer"])
    return context


def command(file, out, ignored=None):
    """`dgrpo train FILE`, its output in files."""
    if ignored is not None:
        signal.signal(ignored, signal.SIG_IGN)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.exit(main(["train", str(file)]))


def started(processes, tmp_path, wanted, ignored=None):
    """A process of the command line."""
    file = tmp_path / "run.yaml"
    file.write_text(dump(wanted))
    process = processes.Process(target=command, args=(file, tmp_path / "log", ignored))
    process.start()
    return process


def wait_for(found, process):
    """Waits until there is something, as long as the process lives."""
    while not found():
        assert process.is_alive()
        time.sleep(0.02)


def steps(folder):
    """Steps that have been logged."""
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("number", ENDING, ids=lambda number: signal.Signals(number).name)
def test_a_signal_ends_a_run_with_a_checkpoint_and_its_status(home, tmp_path, processes, number):
    out = tmp_path / "run"
    process = started(processes, tmp_path, settings(home, out, steps=10_000))
    wait_for(lambda: steps(out) >= 2, process)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number
    assert newest(out) == [steps(out)] and not (out / "done.yaml").exists()
    text = (tmp_path / "log.out").read_text()
    assert f"stopped at step {steps(out)} in {out} ({signal.Signals(number).name})" in text
    assert (tmp_path / "log.err").read_text() == ""


@pytest.mark.parametrize("number", ENDING, ids=lambda number: signal.Signals(number).name)
def test_a_signal_while_it_starts_ends_it_cleanly(home, tmp_path, processes, number):
    mark = tmp_path / "mark"
    options = {"path": str(home / "rows.jsonl"), "mark": str(mark)}
    data = {"sources": [{"path": f"{HERE}:slow_rows", "options": options}]}
    process = started(processes, tmp_path, settings(home, tmp_path / "run", data=data))
    wait_for(mark.exists, process)
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == 128 + number
    assert "stopped at step 0" in (tmp_path / "log.out").read_text()
    assert (tmp_path / "log.err").read_text() == ""
    train(settings(home, tmp_path / "run"))  # the folder is free


def test_the_same_signal_again_ends_at_once(home, tmp_path, processes, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.setenv("DGRPO_TEST_MARK", str(mark))
    rewards = {"functions": [{"path": f"{HERE}:endless"}], "timeout": None}
    wanted = settings(home, tmp_path / "run", "grpo", rewards=rewards)
    file = tmp_path / "run.yaml"
    file.write_text(dump(wanted))
    process = multiprocessing.get_context("spawn").Process(
        target=command, args=(file, tmp_path / "log")
    )
    process.start()
    wait_for(mark.exists, process)
    for _ in range(2):
        process.terminate()
        time.sleep(0.3)
    process.join(5)
    assert process.exitcode == -signal.SIGTERM
    assert (tmp_path / "log.err").read_text() == ""


def test_an_ignored_hangup_stays_ignored(home, tmp_path, processes):
    out = tmp_path / "run"
    process = started(processes, tmp_path, settings(home, out, steps=30), signal.SIGHUP)
    wait_for(lambda: steps(out) >= 2, process)
    os.kill(process.pid, signal.SIGHUP)
    process.join(60)
    assert process.exitcode == 0 and steps(out) == 30


def test_a_reader_that_is_gone_costs_no_checkpoint(home, tmp_path):
    """As `dgrpo train ... | tee log` and Ctrl-C, which ends tee too."""
    out, file = tmp_path / "run", tmp_path / "run.yaml"
    file.write_text(dump(settings(home, out, steps=10_000)))
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dgrpo.cli", "train", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | paths,
    )
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.stdout.close()
    seen = steps(out)
    while steps(out) < seen + 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert newest(out) == [steps(out)] and process.stderr.read() == ""


def one_rank(rank, port, file, out):
    """What torchrun starts; rank 1 alone gets a signal, in its reward's second call."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    WHEN["calls"] = 2 * rank
    command(file, out / f"log-{rank}")


def test_a_signal_to_one_rank_ends_all(home, tmp_path, processes):
    (tmp_path / "run.yaml").write_text(dump(rung(home, tmp_path / "run", 0, steps=9)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = [
        processes.Process(target=one_rank, args=(rank, port, tmp_path / "run.yaml", tmp_path))
        for rank in (0, 1)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in group] == [143, 143]
    assert newest(tmp_path / "run") == [steps(tmp_path / "run")] == [2]
    assert "stopped at step 2" in (tmp_path / "log-0.out").read_text()
    assert (tmp_path / "log-1.out").read_text() == ""
