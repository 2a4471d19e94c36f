"""The tasks by name, what to make of them, and one row of it."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dgrpo.longblocks.tasks import grounding, longform, multihop, tracing
from dgrpo.longblocks.tasks.corpus import SPLITS
from dgrpo.longblocks.tasks.facts import Draft, Ground

# Per task its family and what makes a row.
TASKS: dict[str, tuple[str, Callable[[Draft], dict]]] = {
    "variable_tracing": ("multi_hop", multihop.variable_tracing),
    "relations": ("multi_hop", multihop.relations),
    "counting": ("multi_hop", multihop.counting),
    "comparison": ("multi_hop", multihop.comparison),
    "quoting": ("grounding", grounding.quoting),
    "contradicting": ("grounding", grounding.contradicting),
    "superseded": ("grounding", grounding.superseded),
    "unanswerable": ("grounding", grounding.unanswerable),
    "report": ("long_form", longform.report),
    "definition": ("code", tracing.definition),
    "call_chain": ("code", tracing.call_chain),
    "retrieval": ("retrieval", multihop.retrieval),
}


@dataclass(frozen=True)
class MakeSettings:
    """What to make."""

    out: str  # folder for the files part-00000.parquet and on
    tasks: tuple[str, ...] = ("all",)  # names in TASKS
    count: int = 1000  # rows in all, dealt out to tasks and lengths in turn
    tokens: tuple[int, ...] = (32_768,)  # lengths of document and question, by the tokenizer
    tokenizer: str = "bytes"  # folder or hub name; "bytes": one token per byte
    haystack: str | None = None  # folder of text or code; None: the standard library
    split: str = "train"  # or "test": from text that no training row has
    seed: int = 0
    processes: int = 1
    file_tokens: int = 2_000_000  # about how many tokens of text a file holds

    def __post_init__(self):
        unknown = [name for name in self.tasks if name not in TASKS and name != "all"]
        if unknown or not self.tasks:
            raise ValueError(f"tasks: got {unknown or 'none'}, expected all or {', '.join(TASKS)}")
        if self.split not in SPLITS:
            raise ValueError(f"split: got {self.split!r}, expected one of {', '.join(SPLITS)}")
        if self.count < 1 or self.processes < 1:
            raise ValueError(f"count: got {self.count}, expected at least 1; processes as well")
        if not self.tokens or min(self.tokens) < 500:
            raise ValueError(f"tokens: got {self.tokens}, expected lengths of at least 500")

    @property
    def named(self) -> tuple[str, ...]:
        """`tasks` without "all"."""
        return tuple(TASKS) if "all" in self.tasks else self.tasks

    @property
    def file_rows(self) -> int:
        """Rows per file."""
        return min(max(1, self.file_tokens // max(self.tokens)), 256)


def make_row(ground: Ground, settings: MakeSettings, number: int) -> dict:
    """Row `number` of the settings; deterministic. Raises ValueError where it cannot be made."""
    names = settings.named
    task = names[number % len(names)]
    tokens = settings.tokens[number // len(names) % len(settings.tokens)]
    key = [settings.seed, zlib.crc32(settings.split.encode()), number]
    family, function = TASKS[task]
    made = function(Draft(ground, np.random.default_rng(key), tokens))
    identifier = f"{task}-{tokens}-{settings.split}-{settings.seed}-{number}"
    return {"id": identifier, **made, "family": family, "task": task, "seed": settings.seed}
