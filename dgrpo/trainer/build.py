"""Everything of a run made from its settings, and continued from its last checkpoint."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import transformers
import yaml

from dgrpo import distributed as ranks
from dgrpo.data import Prompt, PromptStream
from dgrpo.longblocks.rewards.runner import Scorer
from dgrpo.trainer.attempts import gate, teacher_context
from dgrpo.trainer.checkpoint import Checkpointer
from dgrpo.trainer.columns import check_columns
from dgrpo.trainer.config import DataSource, Reward, RunSettings, dump, parse_file
from dgrpo.trainer.loading import load_tokenizer
from dgrpo.trainer.metrics import RunLog
from dgrpo.trainer.models import (
    load_objective,
    load_policy,
    load_reference,
    load_teacher,
    place,
    shard,
)
from dgrpo.trainer.optim import make_optimizers
from dgrpo.trainer.policy import PolicyModel, fsdp
from dgrpo.trainer.rollout import HFSampler
from dgrpo.trainer.run import Run, unpack_pending
from dgrpo.trainer.seeds import seed_all, seeded

log = logging.getLogger(__name__)

SURVEY = 5.0  # seconds in which rows are read at the start, to say how many will be dropped


def build(settings: RunSettings) -> Run:
    """Everything of a run, continued from its folder's last checkpoint where it has one.

    Starts torch.distributed under torchrun. Raises ValueError on settings that do not fit the
    model or the data.
    """
    transformers.logging.disable_progress_bar()
    seed_all(settings.seed)  # rows from a function are the same on every rank
    device, mesh = place(settings)
    tokenizer = load_tokenizer(settings.model)
    model = shard(load_policy(settings.model, settings.seed), settings, mesh, device)
    if len(tokenizer) > model.vocab_size:
        raise ValueError(
            f"model.tokenizer: got {len(tokenizer)} tokens for a head of {model.vocab_size} rows, "
            "expected at most as many; set vocab_size in model.config, or another tokenizer"
        )
    method, lora = settings.method, settings.model.lora
    options = {
        "divergence": method.divergence,
        "divergence_clip": method.divergence_clip,
        "jsd_beta": method.jsd_beta,
        "temperature": settings.rollout.temperature if method.sequences == "rollout" else 1.0,
        "teacher_temperature": settings.teacher.temperature,
        "policy_logits": settings.head.policy_logits,
        "memory_budget": settings.head.memory_budget,
        "backend": settings.head.backend,
    }
    teacher = load_teacher(settings, model, tokenizer, mesh, device, options)
    objective, per_sequence = load_objective(method.objective)
    optimizer = settings.optimizer
    stream = _stream(
        settings,
        settings.data.sources,
        tokenizer,
        epochs=settings.epochs,
        context=_context(settings, model, getattr(teacher, "model", None)),
        reserve=settings.rollout.max_tokens if method.sequences == "rollout" else None,
    )
    context = teacher_context(method.teacher_context, method.teacher_template)
    check_columns(method.teacher_context, context, stream)
    run = Run(
        settings=settings,
        device=device,
        model=model,
        tokenizer=tokenizer,
        stream=stream,
        held_out=_held_out(settings, model, tokenizer),
        teacher=teacher,
        reference=load_reference(settings, mesh, device),
        sampler=HFSampler(
            model,
            tokenizer,
            vocab_size=options.get("vocab_size"),
            batch_tokens=settings.rollout.batch_tokens,
        ),
        scorer=_scorer(settings),
        context=context,
        gate=gate(method.gate),
        objective=objective,
        per_sequence=per_sequence,
        options=options,
        optimizers=make_optimizers(
            model,
            optimizer.kind,
            lr=optimizer.lr,
            muon_lr=optimizer.muon_lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
        ),
        checkpointer=Checkpointer(
            Path(settings.out) / "checkpoints",
            keep=settings.checkpoint.keep,
            asynchronous=settings.checkpoint.asynchronous,
            frozen=lora is None,
        ),
        log=None,  # type: ignore[arg-type]  # after the checkpoint: it cuts the metrics back to it
        gradient_scale=1 if mesh is None else fsdp.gradient_scale(mesh),
        steps=_known_steps(settings, stream.size),
    )
    seed_all(settings.seed + ranks.rank())
    _resume(run)
    _tell_rows(run)
    return run


def _scorer(settings: RunSettings) -> Scorer | None:
    """The rewards in their worker; None where no completion is ever scored."""
    if settings.method.sequences == "given" and not settings.evaluate.sources:
        return None
    functions = settings.rewards.functions
    if not functions:
        # Rows may name the library's rewards only; what the settings name may be called too.
        sources = [*settings.data.sources, *settings.evaluate.sources]
        allow = sorted({source.reward for source in sources if source.reward})
        functions = [Reward(path="by_row", options={"allow": allow})]
    return Scorer(functions, timeout=settings.rewards.timeout, seed=settings.seed)


def _stream(
    settings: RunSettings, sources: list[DataSource], tokenizer: Any, **options: Any
) -> PromptStream:
    data = settings.data
    defaults = {
        "seed": settings.seed,
        "shuffle": data.shuffle,
        "min_prompt_tokens": data.min_prompt_tokens,
        "max_prompt_tokens": data.max_prompt_tokens,
        "max_completion_tokens": data.max_completion_tokens,
        "require_completion": settings.method.sequences == "given",
    }
    return PromptStream(
        sources,
        tokenizer,
        chat=data.chat,
        chat_options=data.chat_options,
        system=data.system,
        rank=ranks.rank(),
        world=ranks.world(),
        **{**defaults, **options},
    )


def _context(settings: RunSettings, *models: PolicyModel | None) -> int | None:
    """Most tokens of a training row: what the policy and its teacher can read; None: no limit."""
    limits = [model.context for model in models if model is not None]
    context = min(filter(None, limits), default=None)
    if settings.method.sequences == "rollout":
        _check_room("rollout.max_tokens", settings.rollout.max_tokens, context)
    return context


def _check_room(setting: str, tokens: int, context: int | None) -> None:
    if context is not None and tokens >= context:
        raise ValueError(
            f"{setting}: got {tokens}, expected less than the {context} tokens of the model's "
            "context (max_position_embeddings); the prompt is part of them"
        )


def _tell_rows(run: Run) -> None:
    """How many rows will be dropped, as far as a few seconds of reading can tell."""
    if ranks.rank() or run.finished():
        return
    with seeded(0):  # how many rows are looked at must not move the generators of hooks
        looked, report = run.stream.survey(SURVEY)
    if report.dropped:
        total = sum(cursor.size or 0 for cursor in run.stream.cursors)
        rows = f"{looked} rows" if looked == total else f"{looked} rows looked at ({total} in all)"
        verb = "is" if report.dropped == 1 else "are"
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(report.counts.items()))
        first = f"data: of {rows} {report.dropped} {verb} dropped: {reasons}"
        run.log.message("\n".join([first, *report.lines()[1:]]))


def _held_out(settings: RunSettings, model: PolicyModel, tokenizer: Any) -> list[Prompt]:
    """This rank's prompts of the evaluation."""
    if not settings.evaluate.sources:
        return []
    own = settings.evaluate.max_tokens
    reserve = own or settings.rollout.max_tokens
    _check_room("evaluate.max_tokens" if own else "rollout.max_tokens", reserve, model.context)
    stream = _stream(
        settings,
        settings.evaluate.sources,
        tokenizer,
        shuffle=False,
        require_completion=False,
        max_completion_tokens=None,
        context=model.context,
        reserve=reserve,
    )
    prompts = stream.batch(settings.evaluate.count)
    if stream.report.dropped and ranks.rank() == 0:
        log.warning("evaluation: %s", stream.report.summary())
    return prompts


def _known_steps(settings: RunSettings, rows: int | None) -> int | None:
    """Optimiser steps in all: the setting, or what the epochs give before any row is dropped."""
    if settings.steps is not None or rows is None or settings.epochs is None:
        return settings.steps
    batches = math.ceil(rows * settings.epochs / settings.batch.prompts)
    return batches * settings.batch.updates


def _resume(run: Run) -> None:
    """Continues from the newest checkpoint, or starts the folder's files."""
    settings, folder = run.settings, run.folder
    state = None
    if settings.resume:
        optimizers = [rated.optimizer for rated in run.optimizers]
        state = run.checkpointer.restore(run.model, optimizers)
    if state is not None:
        run.state = state
        run.stream.load_state_dict(state.data)
        run.pending = unpack_pending(state)
        run.saved_step = state.step
    run.log = RunLog(
        folder,
        total_steps=run.steps,
        tensorboard=settings.log.tensorboard,
        wandb=settings.log.wandb,
        settings=settings.model_dump(),
        resume_step=run.state.step if settings.resume else None,
        live=None if settings.log.progress else False,
    )
    run.show_warnings()
    if ranks.rank() == 0:
        changes = _write_settings(folder / "settings.yaml", settings)
        if state is not None:
            run.log.message(f"going on from the checkpoint of step {state.step}")
            for change in changes:
                run.log.message(f"changed since the last start: {change}")
            if run.finished():
                run.log.message("no step is left; for a run of its own, set another `out`")


def _write_settings(path: Path, settings: RunSettings) -> list[str]:
    """Writes the settings beside the run; those of the last start stay as settings.before.yaml.

    Returns what changed, "group.name: old -> new".
    """
    changes = []
    if path.exists():
        before, after = _flat(parse_file(path)), _flat(yaml.safe_load(dump(settings)))
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        changes = [f"{name}: {before.get(name)} -> {after.get(name)}" for name in names]
        if changes:
            path.replace(path.with_name("settings.before.yaml"))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump(settings))
    os.replace(temporary, path)
    return changes


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of a tree of settings."""
    flat = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat
