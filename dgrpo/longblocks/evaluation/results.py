"""Scores of an evaluation: by task and length, as a table, as JSON, as a heat map."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dgrpo.longblocks.evaluation.intervals import Difference, Interval, interval, paired_bootstrap

DEPTHS = 10  # rows of the heat map


@dataclass(frozen=True)
class Item:
    """One scored item.

    Attributes:
        id: the row's.
        task: what it is counted under.
        length: nominal tokens; 0: not known.
        score: in [0, 1].
        depths: where in the document what it needs lies, in [0, 1].
        cluster: items with the same one are not independent.
        chance: score of guessing, if known.
        parts: parts of the reward.
        completion: what the model wrote.
    """

    id: str
    task: str
    length: int
    score: float
    depths: tuple[float, ...] = ()
    cluster: str = ""
    chance: float | None = None
    parts: dict = field(default_factory=dict)
    completion: str = ""


class Results:
    """The items of one evaluation, and those that could not be scored.

    Args:
        items: the scored ones.
        failures: lines that say which rows have no score and why.
        counts: how many, by reason.
    """

    def __init__(
        self,
        items: Sequence[Item],
        failures: Sequence[str] = (),
        counts: dict[str, int] | None = None,
    ):
        self.items, self.failures = list(items), list(failures)
        self.counts = dict(counts or {})

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order of appearance."""
        return list(dict.fromkeys(item.task for item in self.items))

    @property
    def lengths(self) -> list[int]:
        """Lengths, ascending."""
        return sorted({item.length for item in self.items})

    def score(self, task: str | None = None, length: int | None = None) -> Interval | None:
        """Mean and interval of the items of a task and a length (None: all); None without any."""
        some = [
            i
            for i in self.items
            if (task is None or i.task == task) and (length is None or i.length == length)
        ]
        if not some:
            return None
        return interval([i.score for i in some], [i.cluster or i.id for i in some])

    @property
    def reasons(self) -> str:
        """How many rows have no score, by reason, in a line."""
        return ", ".join(f"{n} {reason}" for reason, n in sorted(self.counts.items()))

    @property
    def by_task(self) -> dict[str, Interval]:
        """Mean and interval of every task."""
        return {task: self.score(task) for task in self.tasks}

    @property
    def by_length(self) -> dict[int, Interval]:
        """Mean and interval of every length."""
        return {length: self.score(None, length) for length in self.lengths}

    def table(self) -> str:
        """A Markdown table by task and length, in percent, with 95 % intervals and counts."""
        lengths = self.lengths
        head = ["task", *(short_length(length) for length in lengths), "all", "n", "chance"]
        if len(lengths) < 2:
            del head[1:-3]
        lines = [head]
        for task in [*self.tasks, None] if len(self.tasks) > 1 else self.tasks:
            cells = [self.score(task, length) for length in lengths] if len(lengths) > 1 else []
            whole = self.score(task)
            chance = self._chance(task)
            shown = [_percent(cell) for cell in [*cells, whole]]
            name = task or "mean over items"
            guess = "" if chance is None else f"{100 * chance:.1f}"
            lines.append([name, *shown, str(whole.n) if whole else "0", guess])
        if not any(line[-1] for line in lines[1:]):
            lines = [line[:-1] for line in lines]
        widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
        text = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in lines
        ]
        text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        if self.counts:
            text.append(f"\nwithout a score: {self.reasons}")
            text += [f"  {line}" for line in self.failures[:10]]
        return "\n".join(text)

    def to_json(self, path: str | Path) -> None:
        """Write everything: summary, items with completions, failures."""
        summary = {task: score._asdict() for task, score in self.by_task.items()}
        lengths = {str(length): score._asdict() for length, score in self.by_length.items()}
        content = {
            "tasks": summary,
            "lengths": lengths,
            "counts": self.counts,
            "failures": self.failures,
            "items": [asdict(item) for item in self.items],
        }
        Path(path).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "Results":
        """Read what `to_json` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        items = [Item(**item | {"depths": tuple(item["depths"])}) for item in content["items"]]
        return cls(items, content["failures"], content["counts"])

    def grid(self, task: str | None = None) -> np.ndarray:
        """Mean score by depth and length, (DEPTHS, lengths); NaN where there is no item.

        An item that needs several places counts at each of them.
        """
        lengths = self.lengths
        total, count = np.zeros((2, DEPTHS, max(1, len(lengths))))
        for item in self.items:
            if task is None or item.task == task:
                for depth in item.depths:
                    cell = min(int(depth * DEPTHS), DEPTHS - 1), lengths.index(item.length)
                    total[cell] += item.score
                    count[cell] += 1
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def heatmap(self, path: str | Path, task: str | None = None) -> None:
        """Draw the accuracy by depth and length as a PNG; an empty map where no depth is known."""
        from dgrpo.longblocks.evaluation.plot import draw_heatmap

        title = task or ", ".join(self.tasks[:4]) + (", …" if len(self.tasks) > 4 else "")
        draw_heatmap(self.grid(task), [short_length(n) for n in self.lengths], title, path)

    def _chance(self, task: str | None) -> float | None:
        some = [i for i in self.items if task is None or i.task == task]
        known = [i.chance for i in some if i.chance is not None]
        return float(np.mean(known)) if known and len(known) == len(some) else None


def compare(before: Results, after: Results) -> dict[str, Difference]:
    """Per task, `after - before` on the items that both have (matched by task and id).

    Raises:
        ValueError: no item in common.
    """
    olds = {(item.task, item.id): item for item in before.items}
    shared: dict[str, list[tuple[Item, Item]]] = {}
    for item in after.items:
        if (item.task, item.id) in olds:
            shared.setdefault(item.task, []).append((item, olds[item.task, item.id]))
    if not shared:
        raise ValueError("after: got no item that before has too; evaluate both on the same rows")
    return {
        task: paired_bootstrap(
            [new.score for new, _ in pairs],
            [old.score for _, old in pairs],
            [new.cluster or new.id for new, _ in pairs],
        )
        for task, pairs in shared.items()
    }


def short_length(length: int) -> str:
    """4096 as "4k"; 0 as "any"."""
    if not length:
        return "any"
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if length >= size:
            return f"{length / size:.3g}{unit}"
    return str(length)


def _percent(score: Interval | None) -> str:
    if score is None:
        return ""
    return f"{100 * score.mean:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"
