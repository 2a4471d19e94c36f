"""What the loop works with: the run's live objects, and a step's batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dgrpo.data import Prompt, PromptStream
from dgrpo.distributed import ranks
from dgrpo.head import HeadOutput
from dgrpo.longblocks.rewards.runner import Scorer
from dgrpo.trainer.attempts import Gate, TeacherContext
from dgrpo.trainer.batch import Micro, Sample
from dgrpo.trainer.checkpoint import Checkpointer, RunState
from dgrpo.trainer.config import RunSettings
from dgrpo.trainer.history import History
from dgrpo.trainer.length import Length
from dgrpo.trainer.lock import FolderLock
from dgrpo.trainer.metrics import RunLog
from dgrpo.trainer.optim import Rated
from dgrpo.trainer.policy import PolicyModel
from dgrpo.trainer.rollout import Sampler
from dgrpo.trainer.signals import Interruption
from dgrpo.trainer.standstill import Standstill
from dgrpo.trainer.teachers import SelfTeacher, ServedTeacher, Teacher


@dataclass
class Batch:
    """The samples of one optimiser step on this rank, and what came of them."""

    samples: list[Sample]
    seconds: dict[str, float] = field(default_factory=dict)  # by verb
    tokens: int = 0  # packed, of this rank: a shared prompt counts once a micro-batch
    with_loss: int = 0  # tokens with loss, of all ranks
    outputs: list[tuple[Micro, HeadOutput]] = field(default_factory=list)
    loss: float = 0.0  # of all ranks
    norm: float = 0.0  # of the gradient, before clipping
    lr: float = 0.0


class Above(logging.Handler):
    """Log records above the live display."""

    def __init__(self, log: RunLog):
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        self.log.message(record.getMessage())


@dataclass
class Run:
    """All that the loop works with; `state` and `pending` are what a checkpoint holds of it."""

    settings: RunSettings
    device: torch.device
    model: PolicyModel
    tokenizer: Any
    stream: PromptStream
    held_out: list[Prompt]
    teacher: Teacher | SelfTeacher | ServedTeacher | None
    reference: PolicyModel | None
    sampler: Sampler
    scorer: Scorer | None
    context: TeacherContext | None
    gate: Gate | None
    objective: Callable | None  # None: the fused dGRPO loss
    per_sequence: bool  # the objective couples the tokens of a sequence
    options: dict[str, Any]  # of the loss head
    optimizers: list[Rated]
    checkpointer: Checkpointer
    log: RunLog
    gradient_scale: int  # ranks over which gradients are averaged
    state: RunState = field(default_factory=RunState)
    pending: list[Batch] = field(default_factory=list)
    asked: Interruption = field(default_factory=Interruption)  # whether a signal came, on this rank
    stopping: bool = False  # on all ranks: this step is the last
    failed_in_row: int = 0  # batches since the start of which no sample has a reward, on any rank
    standstill: Standstill = field(default_factory=Standstill)
    saved_step: int | None = None
    clock: float = field(default_factory=time.perf_counter)  # when the last step was recorded
    warnings: logging.Handler | None = None
    # On rank 0:
    lock: FolderLock | None = None
    history: History | None = None
    length: Length | None = None

    @property
    def steps(self) -> int | None:
        """The steps that schedules refer to: those of the settings."""
        return self.settings.steps

    @property
    def interrupted(self) -> bool:
        """Whether a signal asks this rank to end."""
        return self.asked.number is not None

    def expected_steps(self) -> int | None:
        """Optimiser steps in all, as far as known; None on other ranks than 0."""
        if self.length is None:
            return None
        return self.length.steps(self.state.step, len(self.pending))

    def look_at_until(self) -> None:
        """Notes whether the average that `until` looks at is high enough."""
        until, counters = self.settings.until, self.state.counters
        average = counters.get("average")
        counters["reached"] = (
            until is not None
            and average is not None
            and average >= until.above
            and self.state.step >= until.min_steps
        )

    @property
    def sampled(self) -> bool:
        """Whether the sequences are the policy's own."""
        return self.settings.method.sequences == "rollout"

    @property
    def packing(self) -> dict[str, Any]:
        """How samples are packed: the same in training, scoring and the teacher's pass."""
        batch = self.settings.batch
        return {"max_tokens": batch.tokens, "share_prompts": batch.share_prompts}

    @property
    def reads_rewards(self) -> bool:
        """Whether the method's own terms depend on rewards."""
        method = self.settings.method
        context, gate = method.teacher_context, method.gate
        by_reward = context == "correct_rollout" or gate in ("wrong", "mixed")
        return method.advantage == "group" or by_reward

    @property
    def scores_old(self) -> bool:
        """Whether the ratio is taken to log-probabilities of a scoring pass."""
        method, updates = self.settings.method, self.settings.batch.updates
        auto = updates > 1 and method.advantage == "group"
        return method.old_logprobs == "trainer" or (method.old_logprobs == "auto" and auto)

    @property
    def weighs_inside(self) -> bool:
        """Whether the loss takes its importance weights from its own pass: on-policy, by token."""
        method = self.settings.method
        simple = method.importance == "truncate" and method.importance_level == "token"
        return simple and not self.scores_old

    def finished(self) -> bool:
        """Whether the run needs no further step."""
        steps, step = self.settings.steps, self.state.step
        reached = self.state.counters.get("reached", False)
        return self.stopping or reached or (steps is not None and step >= steps)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.settings.out)

    def show_warnings(self) -> None:
        """What the library warns of (rows, rewards) is printed above the display from now on."""
        if ranks().first:
            self.warnings = Above(self.log)
            logging.getLogger("dgrpo").addHandler(self.warnings)

    def close(self) -> None:
        """Ends worker processes, the display and a checkpoint under way."""
        if self.warnings is not None:
            logging.getLogger("dgrpo").removeHandler(self.warnings)
        if self.scorer is not None:
            self.scorer.close()
        self.log.close()
        try:
            self.checkpointer.close()
        finally:
            if self.lock is not None:
                self.lock.release()


def pack_pending(run: Run) -> RunState:
    """The run's state with the batches still to be trained on, a group an entry."""
    entries = []
    for number, batch in enumerate(run.pending):
        groups: dict[int, list[Sample]] = {}
        for sample in batch.samples:
            groups.setdefault(sample.group, []).append(sample)
        for samples in groups.values():
            states = [sample.state() for sample in samples]
            entries.append(
                {"batch": number, "prompt_ids": samples[0].prompt_ids, "samples": states}
            )
    run.state.rollouts = entries
    run.state.counters["pending"] = len(run.pending)
    run.state.data = run.stream.state_dict()
    return run.state


def unpack_pending(state: RunState) -> list[Batch]:
    """What `pack_pending` packed; as many batches on every rank, some perhaps empty here."""
    batches = [Batch([]) for _ in range(state.counters.get("pending", 0))]
    for entry in state.rollouts:
        samples = [Sample.restore(entry["prompt_ids"], state) for state in entry["samples"]]
        batches[entry["batch"]].samples += samples
    state.rollouts = []
    return batches
