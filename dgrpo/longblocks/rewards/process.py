"""The host's end of the worker process: messages in JSON, time limits, killing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

_START = 300.0  # seconds in which the rewards have to be imported
TELL = 10.0  # seconds without a reply before the first warning; each further wait is twice as long
_SCRIPT = Path(__file__).with_name("worker.py").resolve()


class Lost(Exception):
    """The process ended, or did not reply in time."""


class WorkerProcess:
    """A process of `dgrpo.longblocks.rewards.worker` and the pipe to it.

    Its first message, `start`, names the rewards. Raises ValueError where one cannot be imported.
    """

    def __init__(self, start: dict):
        self.pipe, end = Pipe()
        with end:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what rewards print goes to the host's standard error
                pass_fds=[end.fileno()],
                start_new_session=True,  # killed with its children, spared by Ctrl-C
            )
        try:
            self.send(start)
            reply = self.receive(_START)
        except Lost as error:
            self.kill()
            raise ValueError(f"rewards: got {error} while importing them") from error
        if "error" in reply:
            self.kill()
            raise ValueError(reply["error"])

    def send(self, message: dict) -> None:
        """Write a message; raises `Lost`."""
        try:
            self.pipe.send_bytes(json.dumps(message, default=_plain).encode())
        except OSError as error:
            raise Lost(f"worker ended ({self.process.poll()})") from error

    def receive(self, limit: float, tell: Callable[[float], None] = lambda seconds: None) -> dict:
        """Wait `limit` seconds for a message; `tell` hears how long it takes. Raises `Lost`."""
        start, told = time.monotonic(), TELL
        while not self.pipe.poll(max(0.0, start + min(limit, told) - time.monotonic())):
            if limit <= told:
                raise Lost(f"no reply in {limit:.3g} s")
            tell(told)
            told *= 2
        try:
            return json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise Lost(f"worker ended with exit code {self.process.wait()}") from error

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.pipe.close()


def _plain(value: Any) -> Any:
    """What JSON has no type for: arrays as lists, the rest as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
