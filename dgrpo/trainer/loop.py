"""The trainer: one loop for every method, each verb of it a function of another module.

A method is configuration: where the sequences come from, which coefficients, which teacher. Every
normaliser is a token weight, computed before the forward pass over all ranks and micro-batches.

What is left out: asynchronous rollouts (the batch is sampled from the weights that it updates),
sequence parallelism, a critic.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from dgrpo.distributed import ranks
from dgrpo.trainer.build import build
from dgrpo.trainer.checkpoint import export
from dgrpo.trainer.collect import collect
from dgrpo.trainer.config import RunSettings
from dgrpo.trainer.config.run import DONE, EXPORT
from dgrpo.trainer.folder import History, finished, last_step
from dgrpo.trainer.record import evaluate, evaluated, profiled, record
from dgrpo.trainer.run import Run, pack_pending
from dgrpo.trainer.signals import ENDING, Interrupted, listening
from dgrpo.trainer.update import (
    attach_teacher,
    backward,
    micro_batches,
    parameters_finite,
    update,
    weigh,
)


class Outcome(NamedTuple):
    """How a run ended, and the signal that asked for its end, if one did.

    A signal may come too late to stop a run, but not too late for what would come after it.
    """

    status: Literal["finished", "stopped", "already done"]
    step: int
    folder: Path
    signal: int | None = None

    @property
    def interrupted(self) -> bool:
        """Whether nothing should be run after this."""
        return self.signal is not None


class Diverged(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class RewardsFailed(RuntimeError):
    """Every sample's reward failed in too many batches in a row."""


def train_stages(
    stages: Mapping[str, RunSettings], *, allow_changes: bool = False
) -> dict[str, Outcome]:
    """Each stage in order; one that is finished is not run again. Ends early on a signal.

    With `allow_changes` a stage goes on although its folder was trained with another method,
    teacher or data. Without it that raises ValueError, before anything is trained.
    """
    outcomes: dict[str, Outcome] = {}
    for settings in stages.values() if not allow_changes else ():
        History(settings).check()
    with listening() as asked:
        for name, settings in stages.items():
            try:
                if finished(settings):
                    outcomes[name] = without_a_step(settings, "already done")
                else:
                    outcomes[name] = train(settings, allow_changes=allow_changes)
            except Interrupted:  # between two runs
                outcomes[name] = without_a_step(settings, "stopped", asked.number)
            if outcomes[name].interrupted:
                break
    return outcomes


def train(settings: RunSettings, *, allow_changes: bool = False) -> Outcome:
    """One run, continued from its folder's last checkpoint where it has one.

    SIGINT, SIGTERM and SIGHUP end it after the step at hand with a checkpoint, or at once while it
    still starts; the outcome is "stopped". `allow_changes` as for `train_stages`.

    Raises:
        FolderInUse: another run is under way in the folder.
        Diverged: `optimizer.max_skipped` steps without a finite loss and gradient.
        RewardsFailed: `rewards.max_failed` batches without a single reward. Before these two the
            last good state is saved.
    """
    with listening() as asked:
        try:
            run = build(settings, allow_changes=allow_changes, asked=asked)
            asked.deferred = True
            return loop(run)
        except (Exception, Interrupted) as error:
            # Other ranks that the signal ended first are missed in a collective of the start.
            if not isinstance(error, Interrupted) and (asked.number is None or asked.deferred):
                raise
            return without_a_step(settings, "stopped", asked.number)
        finally:
            asked.deferred = False


def without_a_step(settings: RunSettings, status: str, number: int | None = None) -> Outcome:
    """The outcome of a run that trains nothing now: it is done, or a signal came first."""
    folder = Path(settings.out)
    return Outcome(status, last_step(folder), folder, number)


def loop(run: Run) -> Outcome:
    """Trains to the end, and closes the run. COLLECTIVE."""
    try:
        with profiled(run) as profile:
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
    skipped, failed = run.state.skipped_in_row, run.failed_in_row
    if skipped >= run.settings.optimizer.max_skipped:
        good, where = save_if_finite(run)
        raise Diverged(
            f"loss or gradient not finite in {skipped} steps in a row (optimizer.max_skipped); "
            f"{'the parameters are good' if good else 'the parameters are not finite either'}, "
            f"{where}; try a lower optimizer.lr or method.clip_high"
        )
    if failed >= run.settings.rewards.max_failed:
        where = save_if_finite(run)[1]
        raise RewardsFailed(
            f"rewards: every sample failed in {failed} batch{'es in a row' * (failed > 1)} "
            f"(rewards.max_failed), last error: {run.scorer.last_error or 'on another rank'}; "
            f"{where}; fix the reward and start the same command again"
        )
    if run.state.step % run.settings.checkpoint.every == 0 and not skipped:
        if parameters_finite(run):
            save(run)
        else:
            run.log.message(f"step {run.state.step}: parameters not finite, no checkpoint")


def save(run: Run) -> None:
    """A checkpoint of this step, unless there is one. COLLECTIVE."""
    run.log.sync()
    if run.saved_step != run.state.step:
        run.checkpointer.save(run.model, run.optimizers, pack_pending(run))
        run.state.rollouts = []
        run.saved_step = run.state.step


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
    """The last checkpoint, scores and exported model. COLLECTIVE."""
    if run.state.step or not run.stopping:
        save(run)
        run.checkpointer.wait()
    if not run.stopping:
        evaluate_once(run)
    if run.stopping:  # asked perhaps during this evaluation
        run.log.message(f"stopped after step {run.state.step}; the same command goes on from there")
        return Outcome("stopped", run.state.step, run.folder, asked_by(run))
    # On the folder of a finished run, of which nothing was left to train.
    done = run.history is not None and (run.folder / DONE).exists()
    kept = done and (run.folder / EXPORT).exists()
    done, kept = (total > 0 for total in ranks().totals([done, kept]))
    if run.stream.report.dropped and not done:
        run.log.message(f"data: {run.stream.report.summary()}")
    if run.settings.checkpoint.export and not kept:
        name = run.settings.checkpoint.export_dtype
        dtype = getattr(torch, name) if name else None
        export(run.model, run.folder / EXPORT, tokenizer=run.tokenizer, dtype=dtype)
        if run.settings.model.lora is not None:
            export(run.model, run.folder / "adapter", dtype=dtype, merge=False)
    if run.history is not None and not done:
        run.history.end()
    status = "already done" if done else "finished"
    return Outcome(status, run.state.step, run.folder, asked_by(run))


def asked_by(run: Run) -> int | None:
    """The signal that asked any rank to end; None where none did. COLLECTIVE."""
    counts = ranks().totals([run.asked.number == number for number in ENDING])
    return next((int(n) for n, count in zip(ENDING, counts, strict=True) if count), None)
