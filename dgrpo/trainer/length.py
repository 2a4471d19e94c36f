"""How long a run is: how many rows it has, what ends it, and after how many steps."""

from __future__ import annotations

from dgrpo.data import PromptStream
from dgrpo.data.survey import Survey
from dgrpo.trainer.config import RunSettings
from dgrpo.trainer.seeds import seeded

COUNT, GLANCE = 3.0, 1.0  # seconds of reading rows: where they end the run, and where not


class Length:
    """The steps of a run in all.

    Attributes:
        surveys: of the sources' rows. The run ends with the first's where `steps` is not set.
    """

    def __init__(self, settings: RunSettings, stream: PromptStream):
        self.settings, self.stream = settings, stream
        with seeded(0):  # how many rows are read must not move the generators of hooks
            self.surveys = stream.survey(COUNT if self.by_rows else GLANCE)
        self.prompts: int | None = None  # of the whole stream
        if self.by_rows and self.rows.whole:
            self.prompts = stream.length(self.rows.kept * settings.epochs)

    @property
    def rows(self) -> Survey:
        """The survey of the first source."""
        return self.surveys[0]

    @property
    def by_rows(self) -> bool:
        """Whether the end of the rows is that of the run."""
        return self.settings.steps is None

    @property
    def exact(self) -> bool:
        """Whether `steps` will not change any more, but for `until`."""
        return not self.by_rows or self.prompts is not None

    def steps(self, done: int, pending: int) -> int | None:
        """Steps in all, from those that are `done` and those whose batches are `pending`.

        None where it is not known: the rows are streamed.
        """
        if not self.by_rows:
            return self.settings.steps
        prompts = self._all_prompts()
        if prompts is None:
            return None
        batch = self.settings.batch
        full, rest = divmod(max(0, prompts - self.stream.index), batch.prompts)
        return done + pending + full * batch.updates + min(rest, batch.updates)

    def _all_prompts(self) -> int | None:
        """Prompts of the whole stream: counted, else estimated from the rows read so far."""
        if self.prompts is not None or self.rows.usable is None:
            return self.prompts
        cursor, sources = self.stream.cursors[0], self.stream.sources
        size, epochs = self.rows.size, self.settings.epochs
        left = max(0, size * epochs - cursor.epoch * size - cursor.offset)
        rows = self.stream.taken[0] + left * self.rows.kept / self.rows.looked
        return round(rows * sum(source.weight for source in sources) / sources[0].weight)
