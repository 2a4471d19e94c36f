"""What the rows of a source are like, before a run reads them."""

from dataclasses import dataclass, field

from dgrpo.data.render import Prompt
from dgrpo.text.problems import Report


@dataclass
class Survey:
    """What reading some rows of a source gave.

    Attributes:
        size: rows of the source; None while streaming.
        looked, kept: rows that were read, and those of them that are usable.
        report: what was wrong with the others.
        prompt_tokens, completion_tokens: of the usable rows.
    """

    size: int | None
    looked: int = 0
    kept: int = 0
    report: Report = field(default_factory=lambda: Report(lambda line: None))
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def whole(self) -> bool:
        """Whether all rows were read."""
        return self.looked == self.size

    @property
    def usable(self) -> int | None:
        """Usable rows of the source: counted, or estimated; None: not known."""
        return round(self.size * self.kept / self.looked) if self.looked else None

    def add(self, prompt: Prompt | None) -> None:
        """Counts a row; None is one that is not usable."""
        self.looked += 1
        if prompt is not None:
            self.kept += 1
            self.prompt_tokens += len(prompt.ids)
            given = prompt.completion_ids
            self.completion_tokens += 0 if given is None else len(given)
