"""Everything of a run made from its settings, and continued from its last checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from dgrpo.data import Prompt, PromptStream
from dgrpo.distributed import ranks
from dgrpo.extras import say
from dgrpo.longblocks.rewards.runner import Scorer
from dgrpo.ops import DIVERGENCE_OPTIONS, Options
from dgrpo.trainer.attempts import check_columns, gate, teacher_context
from dgrpo.trainer.checkpoint import Checkpointer
from dgrpo.trainer.config import Reward, RunSettings
from dgrpo.trainer.folder import CHECKPOINTS, History
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
from dgrpo.trainer.rollout import HFSampler
from dgrpo.trainer.run import Run, unpack_pending
from dgrpo.trainer.seeds import seed_all
from dgrpo.trainer.signals import Interruption
from dgrpo.trainer.start import Length, loading_model, parameters, summary

log = logging.getLogger(__name__)


def build(
    settings: RunSettings, *, allow_changes: bool = False, asked: Interruption | None = None
) -> Run:
    """Everything of a run, continued from its folder's last checkpoint where it has one.

    Holds the folder until `Run.close`. Starts torch.distributed under torchrun. `asked` tells
    whether a signal asks for the end.

    Raises:
        ValueError: the folder is another run's, or settings do not fit it, the model or the data.
    """
    transformers.logging.disable_progress_bar()
    seed_all(settings.seed)  # rows from a function are the same on every rank
    device, mesh = place(settings)
    history = ranks().only_first(lambda: History.hold(settings, allow_changes))
    try:
        run = _build(settings, device, mesh, asked or Interruption())
        if history is not None:
            run.history = history
            run.length = Length(settings, run.stream)
        run.asked.check()
        seed_all(settings.seed + ranks().rank)
        _resume(run, allow_changes)
        run.asked.check()
        return run
    except BaseException:
        if history is not None:
            history.lock.release()
        raise


def _build(settings: RunSettings, device: torch.device, mesh: Any, asked: Interruption) -> Run:
    tokenizer = load_tokenizer(settings.model)
    say(loading_model(settings, device))
    model = shard(load_policy(settings.model, settings.seed), settings, mesh, device)
    say(f"model: {parameters(model)}")
    asked.check()
    if len(tokenizer) > model.vocab_size:
        raise ValueError(
            f"model.tokenizer: got {len(tokenizer)} tokens for a head of {model.vocab_size} rows, "
            "expected at most as many; set vocab_size in model.config, or another tokenizer"
        )
    method = settings.method
    if method.teaches() and method.teacher == "model":
        say(f"teacher: loading {settings.teacher.name}")
    loaded = load_teacher(settings, model, tokenizer, mesh, device)
    options = Options(
        **{name: getattr(method, name) for name in DIVERGENCE_OPTIONS},
        temperature=settings.rollout.temperature if method.sequences == "rollout" else 1.0,
        teacher_temperature=settings.teacher.temperature,
        vocab_size=loaded.vocab_size,
        policy_logits=settings.head.policy_logits,
        memory_budget=settings.head.memory_budget,
        backend=settings.head.backend,
    )
    asked.check()
    say("data: reading rows")
    objective, per_sequence = load_objective(method.objective)
    readable = min(filter(None, (model.context, loaded.context)), default=None)
    stream = _stream(settings, tokenizer, readable)
    context = teacher_context(method.teacher_context, method.teacher_template)
    check_columns(method.teacher_context, context, stream)
    held_out = _held_out(_stream(settings, tokenizer, model.context, held_out=True), settings)
    return Run(
        settings=settings,
        device=device,
        model=model,
        tokenizer=tokenizer,
        stream=stream,
        held_out=held_out,
        teacher=loaded.teacher,
        reference=load_reference(settings, mesh, device),
        sampler=HFSampler(
            model,
            tokenizer,
            vocab_size=loaded.vocab_size,
            batch_tokens=settings.rollout.batch_tokens,
        ),
        scorer=_scorer(settings),
        context=context,
        gate=gate(method.gate),
        objective=objective,
        per_sequence=per_sequence,
        options=options,
        optimizers=make_optimizers(model, settings.optimizer),
        checkpointer=Checkpointer(
            Path(settings.out) / CHECKPOINTS,
            keep=settings.checkpoint.keep,
            asynchronous=settings.checkpoint.asynchronous,
            frozen=settings.model.lora is None,
        ),
        asked=asked,
    )


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
    settings: RunSettings, tokenizer: Any, context: int | None, *, held_out: bool = False
) -> PromptStream | None:
    """The prompts of training, or those `held_out`; None without such sources.

    `context` is the most tokens of a prompt and its completion; None: no limit.
    """
    data, given = settings.data, settings.method.sequences == "given"
    if held_out:
        other = {"sources": settings.evaluate.sources, "max_completion_tokens": None}
        data = data.model_copy(update={**other, "shuffle": False})
    if not data.sources:
        return None
    own = settings.evaluate.max_tokens if held_out else None
    reserve = (own or settings.rollout.max_tokens) if held_out or not given else None
    if context is not None and reserve is not None and reserve >= context:
        raise ValueError(
            f"{'evaluate' if own else 'rollout'}.max_tokens: got {reserve}, expected less than the "
            f"{context} tokens of the model's context (max_position_embeddings); the prompt is "
            "part of them"
        )
    epochs = settings.epochs if settings.steps is None else None  # rows come round again
    return PromptStream(
        data,
        tokenizer,
        seed=settings.seed,
        epochs=1 if held_out else epochs,
        context=context,
        reserve=reserve,
        require_completion=given and not held_out,
        rank=ranks().data_rank,
        world=ranks().data_world,
    )


def _held_out(stream: PromptStream | None, settings: RunSettings) -> list[Prompt]:
    """This rank's prompts of the evaluation."""
    if stream is None:
        return []
    prompts = stream.batch(settings.evaluate.count)
    if stream.report.dropped and ranks().first:
        log.warning("evaluation: %s", stream.report.summary())
    return prompts


def _resume(run: Run, allow_changes: bool) -> None:
    """Continue from the newest checkpoint, or start the folder's files."""
    settings, history, state = run.settings, run.history, None
    if settings.resume:
        state = run.checkpointer.restore(run.model, run.optimizers)
    if state is not None:
        run.state = state
        if allow_changes and not run.stream.fits(state.data):
            say("data: other rows than before, read from their beginning")
        else:
            run.stream.load_state_dict(state.data)
        run.pending = unpack_pending(state)
        run.saved_step = state.step
    changes, total = [] if history is None else history.changes, run.expected_steps()
    if history is not None:
        told = summary(run.length, run.teacher, run.state.step, total)
        for line in [*history.lock.notes, *told]:
            say(line)
        history.begin()
    run.log = RunLog(
        run.folder,
        total_steps=total,
        tensorboard=settings.log.tensorboard,
        wandb=settings.log.wandb,
        settings=settings.model_dump(),
        resume_step=run.state.step if settings.resume else None,
        live=None if settings.log.progress else False,
    )
    run.show_warnings()
    if state is not None:
        run.log.message(f"going on from the checkpoint of step {state.step}")
        for change in changes:
            run.log.message(f"changed since the last start: {change}")
        if run.finished():
            run.log.message("no step is left; for a run of its own, set another `out`")
