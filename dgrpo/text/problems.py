"""What went wrong with the data: every bad row is reported, counted and skipped, never fatal."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("dgrpo.data")

EXAMPLES = 3


class BadRow(ValueError):
    """A row that cannot be used: `reason` groups rows in counts, `detail` tells them apart."""

    def __init__(self, reason: str, detail: str = "", where: str = ""):
        self.reason, self.detail, self.where = reason, detail, where
        super().__init__(f"{where or 'row'}: {reason}" + (f" ({detail})" if detail else ""))


class Report:
    """Counts of what was kept and of what was dropped, by reason, with the first examples.

    Args:
        log: receives a line for the first rows of each reason, and for those whose number is a
            power of ten; the default warns through `logging`.
        path: a JSONL file that gets every dropped row's place, reason and detail.
    """

    def __init__(self, log: Callable[[str], None] | None = None, path: str | Path | None = None):
        self.log = log or logger.warning
        self.path = Path(path) if path else None
        self.kept = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def drop(self, problem: BadRow, where: str = "") -> None:
        """Record one dropped row."""
        where, detail = problem.where or where, f": {problem.detail}" if problem.detail else ""
        self.counts[problem.reason] += 1
        count = self.counts[problem.reason]
        if count <= EXAMPLES:
            self.examples.setdefault(problem.reason, []).append(f"{where}{detail}")
        if self.path:
            entry = {"where": where, "reason": problem.reason, "detail": problem.detail}
            append_json(self.path, entry)
        if count <= EXAMPLES or count == 10 ** (len(str(count)) - 1):
            self.log(f"dropped {where}: {problem.reason}{detail} (number {count} of this kind)")

    @property
    def dropped(self) -> int:
        """How many rows were dropped, for whatever reason."""
        return self.counts.total()

    def summary(self) -> str:
        """One line: what was kept, what was dropped and why."""
        parts = ", ".join(f"{n} {reason}" for reason, n in sorted(self.counts.items()))
        return f"{self.kept} rows kept, {self.dropped} dropped" + (f": {parts}" if parts else "")

    def lines(self) -> list[str]:
        """The summary, and the first examples of every reason."""
        found = [f"  {reason}: {e}" for reason, es in sorted(self.examples.items()) for e in es]
        return [self.summary(), *found]

    def state_dict(self) -> dict:
        """The counts, for a checkpoint."""
        return {"kept": self.kept, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        """Take over the counts of `state_dict`."""
        self.kept, self.counts = state["kept"], Counter(state["counts"])


def append_json(path: Path, entry: dict) -> None:
    """Append one line to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
