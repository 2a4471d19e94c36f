"""Listening to signals: nested, passed on by a launcher."""

import os
import signal
import time

import pytest

from dgrpo.trainer.signals import Interrupted, listening


def test_listening_within_listening_is_the_same():
    before = signal.getsignal(signal.SIGTERM)
    with listening() as outer, pytest.raises(Interrupted), listening() as inner:
        assert inner is outer
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert outer.number == signal.SIGTERM and outer.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_launcher_may_pass_a_signal_on_to_processes_that_have_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("dgrpo.trainer.signals.TOGETHER", 0.5)
    again = []
    with listening(then=lambda *_: again.append(True)) as asked:
        asked.deferred = True
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.number == signal.SIGTERM and not again
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert again
