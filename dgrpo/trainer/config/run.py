"""The whole of a run: how it ends, what it leaves, all groups and the rules between them."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dgrpo.trainer.config.method import Method, Schedule
from dgrpo.trainer.config.settings import (
    Batch,
    Data,
    DataSource,
    DtypeName,
    Fsdp,
    Head,
    Model,
    Optimizer,
    Rewards,
    Rollout,
    Settings,
    Teacher,
)

# What several modules name of a run's folder.
METRICS, SETTINGS, DONE = "metrics.jsonl", "settings.yaml", "done.yaml"
ROLLOUTS, EVALUATION, EXPORT = "rollouts", "evaluation", "export"


class Until(Settings):
    """Ends the run early, once a metric's moving average is there."""

    metric: str = "token_accuracy"
    """Name of a logged metric."""
    above: float
    """Value to reach."""
    smoothing: float = Field(0.9, ge=0.0, lt=1.0)
    """Weight of the past in the moving average."""
    min_steps: NonNegativeInt = 10
    """Steps before it is looked at."""


class Checkpoint(Settings):
    """What is kept on disk."""

    every: PositiveInt = 50
    """Steps between checkpoints; the last step has one too."""
    keep: PositiveInt = 2
    """Checkpoints kept."""
    asynchronous: bool = True
    """Write in the background, where it can be."""
    export: bool = True
    """Write a Hugging Face folder at the end (a later stage needs it), and LoRA's adapter."""
    export_dtype: DtypeName | None = None
    """Type of the exported weights; null: that of the masters."""


class Evaluate(Settings):
    """Held-out prompts, scored by the rewards during the run."""

    sources: list[DataSource] = []
    """Where they come from; none: no evaluation."""
    count: PositiveInt = 200
    """Prompts, the same ones each time."""
    every: PositiveInt | None = None
    """Steps between evaluations; null: only before the first step and after the last."""
    greedy: bool = True
    """Most probable token, or sampling as in training."""
    max_tokens: PositiveInt | None = None
    """Longest completion; null: rollout.max_tokens."""


class Log(Settings):
    """Logging and display."""

    progress: bool = True
    """Live display on a terminal."""
    samples: NonNegativeInt = 8
    """Completions written with rewards and token values, each time."""
    samples_every: PositiveInt = 10
    """Steps between them."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    wandb: str | None = None
    """Weights & Biases project to log to."""
    profile_steps: list[NonNegativeInt] | None = Field(None, min_length=2, max_length=2)
    """First and last step of a profiler trace and a memory snapshot."""

    @model_validator(mode="after")
    def _profile_steps_ascend(self) -> Self:
        steps = self.profile_steps
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"profile_steps: got {steps}, expected [first, last], from step 1 on")
        return self


class RunSettings(Settings):
    """One stage with all of its values: what the trainer is given."""

    out: str = "runs/dgrpo"
    """Folder of the run: settings, metrics, samples, checkpoints, exported model."""
    seed: NonNegativeInt = 0
    """Seed of data order, sampling and random weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto: the GPU if there is one."""
    steps: PositiveInt | None = None
    """Optimiser steps, for which the rows come round again; null: as many as `epochs` give."""
    epochs: PositiveInt | None = 1
    """Passes over the first source, where `steps` is null."""
    until: Until | None = None
    """Early end by a metric."""
    resume: bool = True
    """Go on from the folder's last checkpoint, if it has one."""
    model: Model = Model()
    method: Method = Method()
    teacher: Teacher = Teacher()
    data: Data = Data()
    rollout: Rollout = Rollout()
    rewards: Rewards = Rewards()
    batch: Batch = Batch()
    head: Head = Head()
    optimizer: Optimizer = Optimizer()
    fsdp: Fsdp = Fsdp()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()

    @model_validator(mode="after")
    def _groups_agree(self) -> Self:
        method, model, teacher = self.method, self.model, self.teacher
        lora, served = model.lora, method.teacher == "served"
        if model.name is None and model.config is None:
            raise ValueError("model.name: got neither it nor model.config, expected one of them")
        if method.sequences == "rollout" and lora is not None and lora.dropout > 0:
            raise ValueError(
                "model.lora.dropout: got a value above 0 with method.sequences=rollout, expected "
                "0; dropout makes the ratio to the sampled policy noise"
            )
        if model.name is None and method.ref_coef != 0.0:
            raise ValueError("method.ref_coef: got a value above 0 with random weights, expected 0")
        if not self.data.sources:
            raise ValueError("data.sources: got none, expected some, e.g. [{path: rows.jsonl}]")
        if method.teacher == "model" and method.teacher_coef != 0.0 and teacher.name is None:
            raise ValueError(
                "teacher.name: got null, expected a name or folder; for none: method.preset=grpo"
            )
        if served and (teacher.url is None or teacher.name is None):
            raise ValueError(
                "teacher.url: got null (or teacher.name), expected an endpoint and its model's name"
            )
        if served and teacher.temperature != 1:
            raise ValueError(
                f"teacher.temperature: got {teacher.temperature} with a served teacher, expected "
                "1; its log-probabilities come at the server's own temperature"
            )
        if method.advantage == "group":
            if self.rollout.group_size == 1:
                raise ValueError(
                    "rollout.group_size: got 1, expected more; a group of one has no advantage"
                )
            if method.old_logprobs == "none" and self.batch.updates > 1:
                raise ValueError(
                    "method.old_logprobs: got none with batch.updates > 1, expected trainer or "
                    "sampler; without it the ratio is 1 and never clips"
                )
        if self.steps is not None:
            return self
        if self.epochs is None:
            raise ValueError("steps: got null with epochs null; the run would have no end")
        if self.optimizer.decay != "constant":
            raise ValueError("steps: got null with optimizer.decay, which needs their number")
        for name in ("teacher_coef", "ref_coef", "entropy_coef"):
            value = getattr(method, name)
            if isinstance(value, Schedule) and value.steps is None:
                raise ValueError(f"method.{name}.steps: got null without steps, expected either")
        return self
