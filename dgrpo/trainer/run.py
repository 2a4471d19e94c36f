"""What the loop works with: the run's live objects, and a step's batch."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dgrpo.data import Prompt, PromptStream
from dgrpo.distributed import ranks
from dgrpo.head import HeadOutput
from dgrpo.longblocks.rewards.runner import Scorer
from dgrpo.ops import Options
from dgrpo.trainer.attempts import Gate, TeacherContext
from dgrpo.trainer.batch import Micro, Sample, pack
from dgrpo.trainer.checkpoint import Checkpointer, RunState
from dgrpo.trainer.config import RunSettings
from dgrpo.trainer.folder import History
from dgrpo.trainer.metrics import RunLog
from dgrpo.trainer.policy import PolicyModel
from dgrpo.trainer.rollout import HFSampler
from dgrpo.trainer.signals import Interruption
from dgrpo.trainer.start import Length
from dgrpo.trainer.teachers import SelfTeacher, ServedTeacher, Teacher


@dataclass
class Batch:
    """The samples of one optimiser step on this rank, and the step's results."""

    samples: list[Sample]
    seconds: dict[str, float] = field(default_factory=dict)  # by verb
    tokens: int = 0  # packed, of this rank: a shared prompt counts once per micro-batch
    with_loss: int = 0  # tokens with loss, of all ranks
    outputs: list[tuple[Micro, HeadOutput]] = field(default_factory=list)
    loss: float = 0.0  # of all ranks
    norm: float = 0.0  # of the gradient, before clipping
    lr: float = 0.0


IN_A_ROW = 3  # steps that teach nothing before a warning


class Learned(NamedTuple):
    """What a step tells of whether anything is learned."""

    loss: float
    norm: float  # of the gradient
    lowest: float | None  # of its rewards; None where it has none
    highest: float | None


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
    sampler: HFSampler
    scorer: Scorer | None
    context: TeacherContext | None
    gate: Gate | None
    objective: Callable | None  # None: the fused dGRPO loss
    per_sequence: bool  # the objective couples the tokens of a sequence
    options: Options  # of the loss head
    optimizers: list[torch.optim.Optimizer]
    checkpointer: Checkpointer
    log: RunLog = field(init=False)  # made after the checkpoint: cuts the metrics back to it
    state: RunState = field(default_factory=RunState)
    pending: list[Batch] = field(default_factory=list)
    asked: Interruption = field(default_factory=Interruption)  # whether a signal came, on this rank
    stopping: bool = False  # on all ranks: this step is the last
    failed_in_row: int = 0  # batches since the start of which no sample has a reward, on any rank
    recent: deque[Learned] = field(default_factory=lambda: deque(maxlen=IN_A_ROW + 1))
    saved_step: int | None = None
    clock: float = field(default_factory=time.perf_counter)  # when the last step was recorded
    warnings: logging.Handler | None = None
    # On rank 0:
    history: History | None = None
    length: Length | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a signal asks this rank to end."""
        return self.asked.number is not None

    def expected_steps(self) -> int | None:
        """Optimiser steps in all, as far as known; None on other ranks than 0."""
        if self.length is None:
            return None
        return self.length.steps(self.state.step, len(self.pending))

    @property
    def sampled(self) -> bool:
        """Whether the sequences are the policy's own."""
        return self.settings.method.sequences == "rollout"

    def pack(self, samples: Sequence[Sample], **coefficients: Any) -> list[Micro]:
        """Samples packed as the settings say, the same in training and scoring; see `pack`."""
        batch = self.settings.batch
        return pack(samples, batch.tokens, share_prompts=batch.share_prompts, **coefficients)

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
        steps, step, until = self.settings.steps, self.state.step, self.settings.until
        average = self.state.average
        if until is not None and average is not None and step >= until.min_steps:
            if average >= until.above:
                return True
        return self.stopping or (steps is not None and step >= steps)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.settings.out)

    def show_warnings(self) -> None:
        """Print what the library warns of (rows, rewards) above the display from now on."""
        if ranks().first:
            self.warnings = logging.Handler(logging.WARNING)
            self.warnings.emit = lambda record: self.log.message(record.getMessage())
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
            if self.history is not None:
                self.history.lock.release()


def pack_pending(run: Run) -> RunState:
    """The run's state with the batches still to be trained on, one entry per group."""
    run.state.rollouts = []
    for number, batch in enumerate(run.pending):
        for _, group in groupby(batch.samples, key=lambda sample: sample.group):
            samples = list(group)
            entry = {"batch": number, "prompt_ids": samples[0].prompt_ids}
            run.state.rollouts.append(entry | {"samples": [s.state() for s in samples]})
    run.state.pending = len(run.pending)
    run.state.data = run.stream.state_dict()
    return run.state


def unpack_pending(state: RunState) -> list[Batch]:
    """What `pack_pending` packed; as many batches on every rank, some perhaps empty here."""
    batches = [Batch([]) for _ in range(state.pending)]
    for entry in state.rollouts:
        samples = [Sample.restore(entry["prompt_ids"], state) for state in entry["samples"]]
        batches[entry["batch"]].samples += samples
    state.rollouts = []
    return batches
