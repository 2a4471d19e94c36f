"""A signal at every moment of a run: nothing is lost, and nothing more is begun."""

import os
import signal
import sys
import threading
import time

import pytest

from dgrpo.cli import main
from dgrpo.trainer import build as module
from dgrpo.trainer import train, train_stages
from dgrpo.trainer.build import build
from dgrpo.trainer.checkpoint import Checkpointer
from dgrpo.trainer.config import dump
from dgrpo.trainer.signals import ENDING
from tests.trainer.home import make_home, metrics, settings  # noqa: F401

HERE = __name__
WHEN: dict[str, int] = {}  # what `ringing` still has to count down to its signal


def ringing(prompts, completions, **columns):
    """A reward that sends this process SIGTERM, once, when it has been called so often."""
    WHEN["calls"] = WHEN.get("calls", 0) - 1
    if WHEN["calls"] == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return [sum(map(ord, text)) % 7 / 6 for text in completions]


def rung(home, out, calls, **groups):
    """Settings of a run that gets SIGTERM in its reward's n-th call."""
    WHEN["calls"] = calls
    rewards = {"functions": [{"path": f"{HERE}:ringing"}], "timeout": None}
    return settings(home, out, "grpo", rewards=rewards, **groups)


def newest(folder):
    return Checkpointer(folder / "checkpoints").steps()[-1:]


def test_the_library_returns_and_leaves_the_handlers_alone(home, tmp_path):
    before = [signal.getsignal(number) for number in ENDING]
    out = train(rung(home, tmp_path / "a", 2, steps=9))
    assert out == ("stopped", 2, tmp_path / "a", signal.SIGTERM)
    assert [signal.getsignal(number) for number in ENDING] == before
    assert train(rung(home, tmp_path / "a", 0, steps=4))[:2] == ("finished", 4)
    train(rung(home, tmp_path / "b", 0, steps=4))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_signal_during_the_first_evaluation_ends_before_a_step(home, tmp_path):
    held_out = {"sources": [{"path": str(home / "rows.jsonl")}], "count": 3}
    out = train(rung(home, tmp_path, 1, evaluate=held_out))
    assert out[:2] == ("stopped", 0) and not newest(tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [0]
    assert train(rung(home, tmp_path, 0, evaluate=held_out)).status == "finished"
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 2]


def test_a_signal_during_a_later_evaluation_ends_before_the_next_step(home, tmp_path):
    held_out = {"sources": [{"path": str(home / "rows.jsonl")}], "count": 3, "every": 2}
    out = train(rung(home, tmp_path, 4, steps=9, evaluate=held_out))
    assert out[:2] == ("stopped", 2) and newest(tmp_path) == [2]


def test_a_signal_during_the_last_evaluation_keeps_the_last_step(home, tmp_path):
    held_out = {"sources": [{"path": str(home / "rows.jsonl")}], "count": 3}
    out = train(rung(home, tmp_path, 4, evaluate=held_out))
    assert out[:2] == ("stopped", 2) and newest(tmp_path) == [2]
    assert not (tmp_path / "done.yaml").exists()
    assert train(rung(home, tmp_path, 0, evaluate=held_out))[:2] == ("finished", 2)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_while_a_checkpoint_is_written(home, tmp_path, monkeypatch, asynchronous):
    save, sent = Checkpointer._write, []

    def interrupted(self, *arguments):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        save(self, *arguments)

    checkpoint = {"every": 2, "asynchronous": asynchronous, "export": False}
    wanted = settings(home, tmp_path / "run", steps=9, checkpoint=checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "_write", interrupted)
        out = train(wanted)
    assert out.status == "stopped" and 2 <= out.step <= 3
    assert newest(tmp_path / "run") == [out.step]
    assert train(wanted).status == "finished"
    train(settings(home, tmp_path / "whole", steps=9, checkpoint=checkpoint))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_signal_that_comes_too_late_stops_what_comes_after(home, tmp_path, monkeypatch, capsys):
    def late(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("dgrpo.trainer.loop.export", late)
    stages = {
        name: settings(home, tmp_path / name, "sft", checkpoint={"export": True})
        for name in ("one", "two")
    }
    outcomes = train_stages(stages)
    assert list(outcomes) == ["one"] and outcomes["one"].interrupted
    assert outcomes["one"].status == "finished" and not (tmp_path / "two").exists()
    (tmp_path / "two.yaml").write_text(dump(stages["two"]))
    assert main(["train", str(tmp_path / "two.yaml")]) == 143
    assert "finished at step 2" in capsys.readouterr().out


def test_the_second_stage_goes_on_where_it_was_stopped(home, tmp_path):
    first = settings(home, tmp_path / "one", "grpo", steps=1)
    outcomes = train_stages({"one": first, "two": rung(home, tmp_path / "two", 2, steps=3)})
    assert [(o.status, o.step) for o in outcomes.values()] == [("finished", 1), ("stopped", 2)]
    outcomes = train_stages({"one": first, "two": rung(home, tmp_path / "two", 0, steps=3)})
    assert [(o.status, o.step) for o in outcomes.values()] == [("already done", 1), ("finished", 3)]


def test_a_signal_whose_exception_is_lost_ends_the_start_all_the_same(home, tmp_path, monkeypatch):
    class Lossy:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # the handler raises here, in a destructor

    def loading(*arguments):
        Lossy()
        return original(*arguments)

    original = module.load_policy
    monkeypatch.setattr(module, "load_policy", loading)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    assert train(settings(home, tmp_path))[:2] == ("stopped", 0)


def test_another_thread_trains_without_signals(home, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(settings(home, tmp_path, "sft"))))
    thread.start()
    thread.join()
    assert found[0].status == "finished"


def test_a_run_that_was_built_alone_needs_no_listening(home, tmp_path):
    run = build(settings(home, tmp_path))
    assert not run.interrupted
    run.close()
