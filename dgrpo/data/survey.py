"""What the rows of a source are like, before a run reads them."""

from dataclasses import dataclass, field

from dgrpo.data.render import Prompt
from dgrpo.text.problems import Report


@dataclass
class Survey:
    """What reading some rows of a source gave."""

    size: int | None  # rows of the source; None while streaming
    looked: int = 0  # rows that were read
    kept: int = 0  # those of them that are usable
    report: Report = field(default_factory=lambda: Report(lambda line: None))  # on the others
    prompt_tokens: int = 0  # of the usable rows
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
        """Count a row; None is one that is not usable."""
        self.looked += 1
        if prompt is not None:
            self.kept += 1
            self.prompt_tokens += len(prompt.ids)
            if prompt.completion_ids is not None:
                self.completion_tokens += len(prompt.completion_ids)
