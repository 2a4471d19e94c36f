"""What a run says while it starts: each stage of loading, then what it will do. Rank 0 speaks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from dgrpo import distributed as ranks
from dgrpo.trainer.config import RunSettings
from dgrpo.trainer.length import Length
from dgrpo.trainer.run import Run
from dgrpo.trainer.teachers.local import SelfTeacher, Teacher


def say(text: str) -> None:
    """Prints a line at once, on rank 0. A terminal or a pipe that is gone is no error."""
    if ranks.rank() == 0:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def loading_model(settings: RunSettings, device: torch.device) -> str:
    """Where the policy comes from and goes to."""
    model = settings.model
    name = model.name or f"{model.config['model_type']} with random weights"
    many = f" on {ranks.world()} ranks" if ranks.world() > 1 else ""
    return f"model: loading {name} ({model.dtype}, {device}{many})"


def parameters(model: nn.Module) -> str:
    """How many parameters a model has, and how many of them are trained."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    every, trained = sum(n for n, _ in counts), sum(n for n, grad in counts if grad)
    which = {0: "none trained", every: "all trained"}.get(trained, f"{trained:,} trained")
    return f"{every:,} parameters, {which}"


def teacher(run: Run) -> str | None:
    """Who teaches; None where nobody does."""
    wanted = run.settings.teacher
    if run.teacher is None:
        return None
    if isinstance(run.teacher, SelfTeacher):
        return f"teacher: the policy itself, shown {run.settings.method.teacher_context}"
    if isinstance(run.teacher, Teacher):
        return f"teacher: {wanted.name}, {parameters(run.teacher.model)}"
    return f"teacher: {wanted.name}, served at {wanted.url}"


def summary(run: Run) -> list[str]:
    """What the run will do."""
    preset, length = run.settings.method.preset, run.length
    lines = [
        teacher(run),
        *(f"data: {line}" for line in rows(length)),
        f"steps: {end(run)}",
        f"each step: {step(run.settings, length)}",
        f"results: {run.folder}",
    ]
    return [f"method: {preset}", *filter(None, lines)] if preset else [*filter(None, lines)]


def rows(length: Length) -> Iterator[str]:
    """How many rows each source has, how many of them are dropped, and the first of these."""
    for source, found in zip(length.stream.sources, length.surveys, strict=True):
        name = source.name or source.path
        if found.size is None:
            yield f"rows of {name}, streamed"
            continue
        dropped, among = found.report.dropped, "" if found.whole else f" of {found.looked:,} read"
        what = f"{dropped or 'none'} dropped{among}"
        if dropped:
            reasons = sorted(found.report.counts.items())
            what += f": {', '.join(f'{count} {reason}' for reason, count in reasons)}"
        yield "\n".join([f"{found.size:,} rows of {name}, {what}", *found.report.lines()[1:]])


def end(run: Run) -> str:
    """After how many steps the run ends, and why."""
    settings, length, done = run.settings, run.length, run.state.step
    total = length.steps(done, len(run.pending))
    if total is None:
        text = f"as many as {passes(settings.epochs)} over the streamed rows give"
    elif length.by_rows:
        about = "" if length.exact else "about "
        text = f"{about}{total:,}, {passes(settings.epochs)} over the rows (epochs)"
    else:
        text = f"{total:,} (steps)"
        usable = length.rows.usable
        if usable and len(length.stream.sources) == 1:
            batches = -(-total // settings.batch.updates)
            over = batches * settings.batch.prompts / usable
            text += f", {over:,.1f} passes over the rows"
    if done:
        text += f"; {done:,} of them are done"
    if (until := settings.until) is not None:
        text += f"; earlier once the mean of {until.metric} is {until.above:g} or more (until)"
    return text


def passes(epochs: int | None) -> str:
    """`1 pass`, `2 passes`."""
    return "1 pass" if epochs == 1 else f"{epochs} passes"


def step(settings: RunSettings, length: Length) -> str:
    """The sequences of an optimiser step and about how many tokens they have."""
    batch, rollout, found = settings.batch, settings.rollout, length.rows
    prompts = batch.prompts / batch.updates
    many = f"{prompts:g} prompts"
    sampled = settings.method.sequences == "rollout"
    if sampled:
        many += f" x {rollout.group_size} completions of up to {rollout.max_tokens:,} tokens"
    if not found.kept:
        return many
    prompt, most = found.prompt_tokens / found.kept, rollout.group_size * rollout.max_tokens
    if not sampled:
        tokens = prompts * (prompt + found.completion_tokens / found.kept)
        return f"{many} with their completions, about {tokens:,.0f} tokens"
    reads = 1 if batch.share_prompts else rollout.group_size
    return f"{many}, at most about {prompts * (reads * prompt + most):,.0f} tokens"
