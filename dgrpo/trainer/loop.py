"""The trainer: one loop for every method.

    from dgrpo.trainer.config import load
    from dgrpo.trainer import train_stages

    train_stages(load("examples/qwen3-1.7b-from-32b.yaml"))

A method is configuration: where the sequences come from, which coefficients, which teacher. Every
verb of the loop is a function elsewhere (dgrpo/training), and every normaliser is a token weight
that is computed before the forward pass, over all ranks and micro-batches.

What is left out: asynchronous rollouts (the batch is sampled from the weights that it updates),
sequence parallelism, a critic.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from dgrpo.distributed import ranks
from dgrpo.trainer.build import build
from dgrpo.trainer.checkpoint import export
from dgrpo.trainer.collect import collect
from dgrpo.trainer.config import RunSettings, dump
from dgrpo.trainer.record import evaluate, evaluated, profiled, record
from dgrpo.trainer.run import Run, pack_pending
from dgrpo.trainer.update import (
    attach_teacher,
    backward,
    micro_batches,
    parameters_finite,
    update,
    weigh,
)


class Outcome(NamedTuple):
    """How a run ended."""

    status: Literal["finished", "stopped", "already done"]
    step: int
    folder: Path


class Diverged(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class RewardsFailed(RuntimeError):
    """Every sample's reward failed in too many batches in a row."""


def train_stages(stages: Mapping[str, RunSettings]) -> dict[str, Outcome]:
    """Each stage in order; one that is finished is not run again. Ends early when stopped."""
    outcomes = {}
    for name, settings in stages.items():
        if finished(settings):
            outcomes[name] = Outcome("already done", 0, Path(settings.out))
            continue
        outcomes[name] = train(settings)
        if outcomes[name].status == "stopped":
            break
    return outcomes


def finished(settings: RunSettings) -> bool:
    """Whether the run's folder says that it came to its end with these very settings."""
    done = Path(settings.out) / "done.yaml"
    return done.exists() and done.read_text() == dump(settings)


def train(settings: RunSettings) -> Outcome:
    """One run, continued from its folder's last checkpoint where it has one.

    SIGINT and SIGTERM end it after the step at hand, with a checkpoint. Raises `Diverged` after
    `optimizer.max_skipped` steps without a finite loss and gradient, and `RewardsFailed` after
    `rewards.max_failed` batches without a single reward, the last good state saved.
    """
    run = build(settings)
    try:
        with interruptible(run), profiled(run) as profile:
            if run.state.step == 0:
                evaluate_once(run)
            while (batch := collect(run)) is not None:
                attach_teacher(run, batch)  # hidden states
                weigh(run, batch)  # global token weights, before forward
                for micro in micro_batches(run, batch):
                    backward(run, batch, micro)
                update(run, batch)
                record(run, batch)
                save_if_due(run)
                if profile is not None:
                    profile.step()
        return finish(run)
    finally:
        run.close()


def evaluate_once(run: Run) -> None:
    """The held-out scores of this step, unless the metrics hold them already. COLLECTIVE."""
    if run.settings.evaluate.sources and not evaluated(run):
        run.log.log(run.state.step, evaluate(run))


def save_if_due(run: Run) -> None:
    """A checkpoint every so many steps; raises when too many steps or rewards failed. COLLECTIVE.

    A skipped step leaves nothing to save, and parameters that are not finite must not push the
    last good checkpoint out.
    """
    skipped = run.state.counters["skipped_in_row"]
    if skipped >= run.settings.optimizer.max_skipped:
        give_up(run)
    if run.failed_in_row >= run.settings.rewards.max_failed:
        stop_without_rewards(run)
    if run.state.step % run.settings.checkpoint.every == 0 and not skipped:
        if parameters_finite(run):
            save(run)
        else:
            run.log.message(f"step {run.state.step}: parameters not finite, no checkpoint")


def save(run: Run) -> None:
    """A checkpoint of this step, unless there is one. COLLECTIVE."""
    run.log.sync()
    if run.saved_step != run.state.step:
        optimizers = [rated.optimizer for rated in run.optimizers]
        run.checkpointer.save(run.model, optimizers, pack_pending(run))
        run.state.rollouts = []
        run.saved_step = run.state.step


def give_up(run: Run) -> None:
    """Saves the state, which the skipped steps left as it was, and raises. COLLECTIVE."""
    count, good, where = run.state.counters["skipped_in_row"], *save_if_finite(run)
    raise Diverged(
        f"loss or gradient not finite in {count} steps in a row (optimizer.max_skipped); "
        f"{'the parameters are good' if good else 'the parameters are not finite either'}, "
        f"{where}; try a lower optimizer.lr or method.clip_high"
    )


def stop_without_rewards(run: Run) -> None:
    """Saves the state and raises, with the last error of a reward. COLLECTIVE."""
    count, (_, where) = run.failed_in_row, save_if_finite(run)
    batches = f"{count} batches in a row" if count > 1 else "1 batch"
    raise RewardsFailed(
        f"rewards: every sample failed in {batches} (rewards.max_failed), last error: "
        f"{run.scorer.last_error or 'on another rank'}; {where}; fix the reward and start the "
        "same command again"
    )


def save_if_finite(run: Run) -> tuple[bool, str]:
    """Whether the parameters are finite and thus saved, and where the last good state is.

    COLLECTIVE.
    """
    good = parameters_finite(run)
    if good:
        save(run)
        run.checkpointer.wait()
    where = f"step {run.state.step}" if good else f"steps {run.checkpointer.steps()}"
    return good, f"checkpoint: {where} in {run.folder}"


def finish(run: Run) -> Outcome:
    """The last scores, checkpoint and exported model. COLLECTIVE."""
    if run.stopping:
        save(run)
        run.checkpointer.wait()
        run.log.message(f"stopped after step {run.state.step}; the same command goes on from there")
        return Outcome("stopped", run.state.step, run.folder)
    evaluate_once(run)
    if run.stream.report.dropped:
        run.log.message(f"data: {run.stream.report.summary()}")
    save(run)
    run.checkpointer.wait()
    if run.settings.checkpoint.export:
        name = run.settings.checkpoint.export_dtype
        dtype = getattr(torch, name) if name else None
        export(run.model, run.folder / "export", tokenizer=run.tokenizer, dtype=dtype)
        if run.settings.model.lora is not None:
            export(run.model, run.folder / "adapter", dtype=dtype, merge=False)
    if ranks().first:
        (run.folder / "done.yaml").write_text(dump(run.settings))
    ranks().wait()
    return Outcome("finished", run.state.step, run.folder)


@contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """SIGINT and SIGTERM ask for an end after this step; a second one ends at once."""

    def ask(number: int, _frame: object) -> None:
        run.interrupted = True
        signal.signal(number, before[number])

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
