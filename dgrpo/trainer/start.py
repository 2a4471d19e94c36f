"""How long a run is, and what it prints while it starts. Rank 0 prints."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dgrpo.data import PromptStream
from dgrpo.data.prompts import Survey
from dgrpo.distributed import ranks
from dgrpo.trainer.config import RunSettings
from dgrpo.trainer.seeds import seeded
from dgrpo.trainer.teachers import SelfTeacher, ServedTeacher, Teacher

COUNT, GLANCE = 3.0, 1.0  # seconds of reading rows: where they end the run, and where not


class Length:
    """The steps of a run in all.

    Attributes:
        surveys: of the sources' rows. The run ends with the first's where `steps` is not set.
        by_rows: whether the end of the rows is that of the run.
        prompts: of the whole stream; None where they were not all counted.
    """

    def __init__(self, settings: RunSettings, stream: PromptStream):
        self.settings, self.stream = settings, stream
        self.by_rows = settings.steps is None
        with seeded(0):  # how many rows are read must not move the generators of hooks
            self.surveys = stream.survey(COUNT if self.by_rows else GLANCE)
        self.prompts: int | None = None
        if self.by_rows and self.rows.whole:
            self.prompts = stream.length(self.rows.kept * settings.epochs)

    @property
    def rows(self) -> Survey:
        """The survey of the first source."""
        return self.surveys[0]

    def steps(self, done: int, pending: int) -> int | None:
        """Steps in all, from those that are `done` and those whose batches are `pending`.

        Counted, else estimated from the rows read so far; None where rows are streamed.
        """
        if not self.by_rows:
            return self.settings.steps
        if self.prompts is None and self.rows.usable is None:
            return None
        prompts = self._estimate() if self.prompts is None else self.prompts
        batch = self.settings.batch
        full, rest = divmod(max(0, prompts - self.stream.index), batch.prompts)
        return done + pending + full * batch.updates + min(rest, batch.updates)

    def _estimate(self) -> int:
        cursor, sources = self.stream.cursors[0], self.stream.sources
        size, epochs = self.rows.size, self.settings.epochs
        left = max(0, size * epochs - cursor.epoch * size - cursor.offset)
        rows = self.stream.taken[0] + left * self.rows.kept / self.rows.looked
        return round(rows * sum(source.weight for source in sources) / sources[0].weight)


def loading_model(settings: RunSettings, device: torch.device) -> str:
    """Where the policy comes from and goes to."""
    model = settings.model
    name = model.name or f"{model.config['model_type']} with random weights"
    many = f" on {ranks().world} ranks" if ranks().world > 1 else ""
    return f"model: loading {name} ({model.dtype}, {device}{many})"


def parameters(model: nn.Module) -> str:
    """How many parameters a model has, and how many of them are trained."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    every, trained = sum(n for n, _ in counts), sum(n for n, grad in counts if grad)
    which = {0: "none trained", every: "all trained"}.get(trained, f"{trained:,} trained")
    return f"{every:,} parameters, {which}"


def summary(
    length: Length,
    teacher: Teacher | SelfTeacher | ServedTeacher | None,
    done: int,
    total: int | None,
) -> Iterator[str]:
    """What the run will do, of whose `total` steps some are `done`."""
    settings = length.settings
    yield f"method: {settings.method.preset}"
    if isinstance(teacher, SelfTeacher):
        yield f"teacher: the policy itself, shown {settings.method.teacher_context}"
    elif isinstance(teacher, Teacher):
        yield f"teacher: {settings.teacher.name}, {parameters(teacher.model)}"
    elif teacher is not None:
        yield f"teacher: {settings.teacher.name}, served at {settings.teacher.url}"
    for source, found in zip(length.stream.sources, length.surveys, strict=True):
        yield f"data: {_rows(source.name or source.path, found)}"
    yield f"steps: {_end(length, done, total)}"
    yield f"each step: {_step(settings, length.rows)}"
    yield f"results: {settings.out}"


def _rows(name: str, found: Survey) -> str:
    """How many rows a source has, how many of them are dropped, and the first of these."""
    if found.size is None:
        return f"rows of {name}, streamed"
    dropped, among = found.report.dropped, "" if found.whole else f" of {found.looked:,} read"
    what = f"{dropped or 'none'} dropped{among}"
    if dropped:
        reasons = sorted(found.report.counts.items())
        what += f": {', '.join(f'{count} {reason}' for reason, count in reasons)}"
    return "\n".join([f"{found.size:,} rows of {name}, {what}", *found.report.lines()[1:]])


def _end(length: Length, done: int, total: int | None) -> str:
    """After how many steps the run ends, and why."""
    settings, usable = length.settings, length.rows.usable
    passes = "1 pass" if settings.epochs == 1 else f"{settings.epochs} passes"
    if total is None:
        text = f"as many as {passes} over the streamed rows give"
    elif length.by_rows:
        about = "about " if length.prompts is None else ""
        text = f"{about}{total:,}, {passes} over the rows (epochs)"
    else:
        text = f"{total:,} (steps)"
        if usable and len(length.surveys) == 1:
            batches = -(-total // settings.batch.updates)
            text += f", {batches * settings.batch.prompts / usable:,.1f} passes over the rows"
    if done:
        text += f"; {done:,} of them are done"
    if (until := settings.until) is not None:
        text += f"; earlier once the mean of {until.metric} is {until.above:g} or more (until)"
    return text


def _step(settings: RunSettings, rows: Survey) -> str:
    """The sequences of an optimiser step and about how many tokens they have."""
    batch, rollout = settings.batch, settings.rollout
    sampled, prompts = settings.method.sequences == "rollout", batch.prompts / batch.updates
    many = f"{prompts:g} prompts"
    if sampled:
        many += f" x {rollout.group_size} completions of up to {rollout.max_tokens:,} tokens"
    if not rows.kept:
        return many
    prompt = rows.prompt_tokens / rows.kept
    if not sampled:
        tokens = prompts * (prompt + rows.completion_tokens / rows.kept)
        return f"{many} with their completions, about {tokens:,.0f} tokens"
    reads = 1 if batch.share_prompts else rollout.group_size
    tokens = prompts * (reads * prompt + rollout.group_size * rollout.max_tokens)
    return f"{many}, at most about {tokens:,.0f} tokens"
