"""Jobs in processes of one thread, some side by side; what is finished is not run again."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

STOPPED = 130  # exit status after Ctrl-C, as shells have it


@dataclass(frozen=True)
class Job:
    """A function to call in a process of its own.

    Attributes:
        name: what is printed.
        function: of a module, called with `arguments`; returns False where a signal stopped it.
        arguments: anything that can be pickled.
        log: file that gets what it prints.
        done: whether there is nothing left to do.
    """

    name: str
    function: Callable[..., bool]
    arguments: tuple[Any, ...]
    log: Path
    done: bool = False


class Failed(RuntimeError):
    """Some jobs raised; the text names them and their logs."""


def run(title: str, jobs: Sequence[Job], workers: int) -> bool:
    """Runs the jobs that are not done, `workers` at a time; False where a signal stopped them.

    The jobs after one that failed are run all the same.

    Raises:
        Failed: a job raised.
    """
    waiting = [job for job in jobs if not job.done]
    if not waiting:
        return True
    print(f"\n== {title}: {len(waiting)} of {len(jobs)} to run", flush=True)
    context = multiprocessing.get_context("spawn")
    running: dict[BaseProcess, tuple[Job, float]] = {}
    failed: list[Job] = []
    began, total, ended, stopped = time.monotonic(), len(waiting), 0, False
    with forwarded(running) as asked:
        while running or (waiting and not asked):
            while waiting and not asked and len(running) < workers:
                job = waiting.pop(0)
                process = context.Process(target=_call, args=(job,))
                process.start()
                running[process] = (job, time.monotonic())
            wait([process.sentinel for process in running])
            for process in [p for p in running if not p.is_alive()]:
                process.join()
                job, start = running.pop(process)
                ended += 1
                left = (time.monotonic() - began) / ended * (total - ended)
                state = {0: "done", STOPPED: "stopped"}.get(process.exitcode, "FAILED")
                stopped |= state == "stopped"
                if state == "FAILED" and not asked:
                    failed.append(job)
                print(
                    f"{ended:3}/{total}  {job.name:32}{state:8}{time.monotonic() - start:6.0f} s"
                    f"   left about {left / 60:.0f} min",
                    flush=True,
                )
    if failed:
        lines = "".join(f"\n  {job.name}: {_last_line(job.log)} ({job.log})" for job in failed)
        raise Failed(f"{len(failed)} of {total} runs failed:{lines}")
    return not (stopped or asked)


@contextlib.contextmanager
def forwarded(running: dict[BaseProcess, Any]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM go on to the processes, which save and end; the list says it came."""
    asked: list[int] = []

    def forward(number: int, _frame: object) -> None:
        asked.append(number)
        for process in list(running):
            process.terminate()

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _call(job: Job) -> None:
    """What a process runs."""
    import torch

    torch.set_num_threads(1)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a", buffering=1) as log:
        sys.stdout = sys.stderr = log
        try:
            finished = job.function(*job.arguments)
        except KeyboardInterrupt:
            finished = False
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.exit(0 if finished else STOPPED)


def _last_line(log: Path) -> str:
    lines = log.read_text().splitlines() if log.exists() else []
    return lines[-1] if lines else "it left no log"
