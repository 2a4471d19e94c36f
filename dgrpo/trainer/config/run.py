"""The whole of a run: all groups, and the rules that hold between them."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dgrpo.trainer.config.base import Settings
from dgrpo.trainer.config.method import Method, Schedule
from dgrpo.trainer.config.settings import (
    Batch,
    Checkpoint,
    Data,
    Evaluate,
    Fsdp,
    Head,
    Log,
    Model,
    Optimizer,
    Rewards,
    Rollout,
    Teacher,
)


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
    def _rules(self) -> "RunSettings":
        for broken, message in _rules(self):
            if broken:
                raise ValueError(message)
        return self


def _rules(run: RunSettings) -> list[tuple[bool, str]]:
    """(broken, message) for each rule between groups."""
    method, model, teacher = run.method, run.model, run.teacher
    rollout = method.sequences == "rollout"
    always_zero = method.teacher_coef == 0.0
    coefficients = {
        name: getattr(method, name) for name in ("teacher_coef", "ref_coef", "entropy_coef")
    }
    endless = [n for n, c in coefficients.items() if isinstance(c, Schedule) and c.steps is None]
    profiled = run.log.profile_steps
    reads_group = method.advantage == "group" or method.teacher_context == "correct_rollout"
    return [
        (
            (model.name is None) == (model.config is None),
            "model.name: got "
            + ("neither it nor" if model.name is None else "both it and")
            + " model.config, expected one of them; model.config makes random weights",
        ),
        (
            model.config is not None and "model_type" not in (model.config or {}),
            "model.config: got no model_type, expected one that transformers knows, e.g. qwen3",
        ),
        (
            model.config is not None and model.tokenizer is None,
            "model.tokenizer: got null with model.config, expected a name or folder",
        ),
        (
            model.lora is not None and model.lora.head and model.lora.targets == "all-linear",
            "model.lora.targets: got all-linear with model.lora.head, expected a list; all-linear "
            "never means the head, e.g. [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
            "down_proj]",
        ),
        (
            rollout and model.lora is not None and model.lora.dropout > 0,
            "model.lora.dropout: got a value above 0 with method.sequences=rollout, expected 0; "
            "dropout makes the ratio to the sampled policy noise",
        ),
        (
            run.steps is None and run.epochs is None,
            "steps: got null with epochs null, expected one of them; the run would have no end",
        ),
        (
            not run.data.sources,
            "data.sources: got none, expected at least one; e.g. data.sources=[{path: rows.jsonl}]",
        ),
        (
            method.teacher == "none" and not always_zero,
            "method.teacher_coef: got a value above 0 without a teacher, expected 0; "
            "set method.teacher",
        ),
        (
            method.teacher == "model" and not always_zero and teacher.name is None,
            "teacher.name: got null, expected a name or folder; for none: method.preset=grpo",
        ),
        (
            method.teacher == "served" and (teacher.url is None or teacher.name is None),
            "teacher.url: got null (or teacher.name), expected the endpoint and its model's name",
        ),
        (
            method.teacher == "served" and teacher.temperature != 1,
            f"teacher.temperature: got {teacher.temperature} with a served teacher, expected 1; "
            "its log-probabilities come at the server's own temperature",
        ),
        (
            method.teacher == "self" and method.teacher_context == "same",
            'method.teacher_context: got "same" for a self-teacher, which then equals the '
            "policy; expected another prompt, e.g. evidence, privileged or correct_rollout",
        ),
        (
            not rollout and reads_group,
            "method.advantage: got group values with given sequences, expected none; "
            "advantages and correct_rollout need method.sequences=rollout",
        ),
        (
            not rollout and method.gate in ("wrong", "mixed"),
            f"method.gate: got {method.gate} with given sequences, expected none; "
            "it reads the rewards of rollouts",
        ),
        (
            not rollout and (method.importance != "none" or method.old_logprobs == "sampler"),
            "method.importance, method.old_logprobs: got a correction to the sampler with given "
            "sequences, expected none; nothing was sampled",
        ),
        (
            method.importance != "none" and method.old_logprobs == "sampler",
            "method.importance: got a correction while the ratio is already taken to the "
            "sampler; expected none, or method.old_logprobs=trainer",
        ),
        (
            run.batch.updates > 1 and method.old_logprobs == "none" and method.advantage == "group",
            "method.old_logprobs: got none with batch.updates > 1, expected trainer or sampler; "
            "without it the ratio is 1 and never clips",
        ),
        (
            method.advantage == "group" and run.rollout.group_size == 1,
            "rollout.group_size: got 1, expected 2 or more; a group of one has no advantage",
        ),
        (
            method.advantage == "none" and always_zero and method.objective == "dgrpo",
            "method.advantage: got none with method.teacher_coef 0, expected one of the two; "
            "there would be no loss",
        ),
        (
            method.divergence == "clipped_forward_kl" and method.divergence_clip is None,
            "method.divergence_clip: got null, expected a bound for clipped_forward_kl",
        ),
        (
            method.divergence != "clipped_forward_kl" and method.divergence_clip is not None,
            f"method.divergence_clip: got a value with {method.divergence}, expected null; "
            "it belongs to clipped_forward_kl",
        ),
        (
            method.clip_dual is not None and method.clip_dual <= 1.0,
            f"method.clip_dual: got {method.clip_dual}, expected more than 1",
        ),
        (
            run.batch.updates > run.batch.prompts,
            f"batch.updates: got {run.batch.updates}, expected at most batch.prompts "
            f"({run.batch.prompts}); each update has at least one prompt",
        ),
        (
            run.steps is None and bool(endless),
            f"method.{endless[0] if endless else ''}.steps: got null without steps, expected one "
            "of them; the length of the schedule is not known",
        ),
        (
            run.optimizer.decay != "constant" and run.steps is None,
            "steps: got null with optimizer.decay, expected a number; the decay needs the end",
        ),
        (
            profiled is not None and not 1 <= profiled[0] <= profiled[1],
            f"log.profile_steps: got {profiled}, expected [first, last], from step 1 on",
        ),
    ]
