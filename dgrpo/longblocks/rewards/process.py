"""The host's end of the worker process: JSON lines, time limits, killing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_START = 300.0  # seconds in which the rewards have to be imported
TELL = 10.0  # seconds without a reply before the first warning; each further wait is twice as long
_SCRIPT = Path(__file__).with_name("worker.py").resolve()


class Lost(Exception):
    """The process ended, or did not reply in time."""


class WorkerProcess:
    """A process of `dgrpo.longblocks.rewards.worker` and its two pipes.

    Its first message, `start`, names the rewards. Raises ValueError where one cannot be imported.
    """

    def __init__(self, start: dict):
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # own process group: killed with its children, spared by Ctrl-C
        )
        self.buffer = bytearray()
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
        line = json.dumps(message, default=_plain) + "\n"
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except OSError as error:
            raise Lost(f"worker ended ({self.process.poll()})") from error

    def receive(self, limit: float, tell: Callable[[float], None] = lambda seconds: None) -> dict:
        """Wait `limit` seconds for a message; `tell` hears how long it takes. Raises `Lost`."""
        start, told, scanned = time.monotonic(), TELL, 0
        while (newline := self.buffer.find(b"\n", scanned)) < 0:
            scanned = len(self.buffer)
            until = min(limit, told)
            if not wait([self.process.stdout], max(0.0, start + until - time.monotonic())):
                if until == limit:
                    raise Lost(f"no reply in {limit:.3g} s")
                tell(told)
                told *= 2
                continue
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise Lost(f"worker ended with exit code {self.process.wait()}")
            self.buffer += data
        line = bytes(self.buffer[:newline])
        del self.buffer[: newline + 1]
        return json.loads(line)

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                pipe.close()


def _plain(value: Any) -> Any:
    """What JSON has no type for: arrays as lists, the rest as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
