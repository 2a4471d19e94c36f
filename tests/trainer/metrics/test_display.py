"""The display suits where it is shown."""

import io
import sys
import types

import pytest

from dgrpo.trainer.metrics import display as display_module
from dgrpo.trainer.metrics.display import Display


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_display_shows_the_last_steps_and_the_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    display = Display(done=40)
    for step in range(41, 61):
        display.update(
            {"step": step, "reward": 0.5, "divergence": 0.1, "memory/peak_gib": 3.25}, 100
        )
    display.message("[bold] is text")
    display.close()
    output = terminal.getvalue()
    assert "\x1b[" in output and "[bold] is text" in output
    last = output[output.rindex("reward") :]
    assert "3.2 GiB" in last and "60/100" in last and " left" in last and " 52 " not in last
    assert "KL" in output and "clipped" not in output


@pytest.mark.parametrize("variable", [{"CI": "true"}, {"TERM": "dumb"}], ids=["CI", "dumb"])
def test_a_log_gets_lines(monkeypatch, variable):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    Display().update({"step": 7, "loss": 1.0})
    assert terminal.getvalue() == "step 7  loss 1\n"


def test_the_time_left_is_that_of_the_steps_since_the_start(monkeypatch):
    clock = iter((0, 30))
    monkeypatch.setattr(
        display_module, "time", types.SimpleNamespace(monotonic=lambda: next(clock))
    )
    display = Display(done=40, live=False)
    assert display.time_left(40, 100) == "" and display.time_left(50, 100) == "0:02:30"
    assert display.time_left(100, 100) == "" and display.time_left(50, None) == ""
