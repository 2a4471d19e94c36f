"""Scores of an evaluation by task and length: as a table, as JSON, as a heat map."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dgrpo.longblocks.evaluation.intervals import Difference, Interval, interval, paired_bootstrap

DEPTHS = 10  # rows of the heat map


@dataclass(frozen=True)
class Item:
    """One scored item."""

    id: str  # of its row
    task: str  # what it is counted under
    length: int  # nominal tokens; 0: not known
    score: float  # in [0, 1]
    depths: tuple[float, ...] = ()  # in [0, 1]: where its evidence lies in the document
    cluster: str = ""  # items of one cluster are not independent
    chance: float | None = None  # score of guessing, if known
    parts: dict = field(default_factory=dict)  # of the reward
    completion: str = ""


@dataclass
class Results:
    """The items of one evaluation, and those that could not be scored."""

    items: Sequence[Item]  # the scored ones
    failures: Sequence[str] = ()  # lines that say which rows have no score and why
    counts: dict[str, int] = field(default_factory=dict)  # how many of them, by reason

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
        some = self._of(task, length)
        clusters = [i.cluster or i.id for i in some]
        return interval([i.score for i in some], clusters) if some else None

    def _of(self, task: str | None, length: int | None = None) -> list[Item]:
        return [i for i in self.items if task in (None, i.task) and length in (None, i.length)]

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
        lengths = self.lengths if len(self.lengths) > 1 else []
        lines = [["task", *map(_short, lengths), "all", "n", "chance"]]
        for task in [*self.tasks, None] if len(self.tasks) > 1 else self.tasks:
            cells = [self.score(task, length) for length in [*lengths, None]]
            shown = ["" if cell is None else percent(cell) for cell in cells]
            chances = [item.chance for item in self._of(task)]
            guess = "" if None in chances else f"{100 * float(np.mean(chances)):.1f}"
            lines.append([task or "mean over items", *shown, str(cells[-1].n), guess])
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
        content = {
            "tasks": {task: score._asdict() for task, score in self.by_task.items()},
            "lengths": {length: score._asdict() for length, score in self.by_length.items()},
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

    def grid(self) -> np.ndarray:
        """Mean score by depth and length, (DEPTHS, lengths); NaN where there is no item.

        An item that needs several places counts at each of them.
        """
        lengths = self.lengths
        total, count = np.zeros((2, DEPTHS, max(1, len(lengths))))
        for item in self.items:
            for depth in item.depths:
                cell = min(int(depth * DEPTHS), DEPTHS - 1), lengths.index(item.length)
                total[cell] += item.score
                count[cell] += 1
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def heatmap(self, path: str | Path) -> None:
        """Draw the accuracy by depth and length as a PNG; an empty map where no depth is known."""
        from matplotlib.figure import Figure

        grid = self.grid()  # grey where it is NaN
        rows, columns = grid.shape
        figure = Figure(figsize=(2.4 + 0.8 * columns, 1.6 + 0.36 * rows), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("0.85")
        image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="RdYlGn")
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(columns), [_short(length) for length in self.lengths])
        axes.set_yticks(np.arange(rows + 1) - 0.5, [f"{k / rows:.0%}" for k in range(rows + 1)])
        axes.set(xlabel="length in tokens", ylabel="depth of the needle")
        title = ", ".join(self.tasks[:4]) + (", …" if len(self.tasks) > 4 else "")
        axes.set_title(title, fontsize=9)
        figure.colorbar(image, ax=axes, label="score")
        figure.savefig(path, dpi=120)


def compare(before: Results, after: Results) -> dict[str, Difference]:
    """Per task, `after - before` on the items that both have (matched by task and id).

    Raises:
        ValueError: no item in common.
    """
    olds = {(item.task, item.id): item for item in before.items}
    shared = Results([item for item in after.items if (item.task, item.id) in olds])
    if not shared.items:
        raise ValueError("after: got no item that before has too; evaluate both on the same rows")
    found = {}
    for task in shared.tasks:
        news = shared._of(task)
        scores = [new.score for new in news], [olds[task, new.id].score for new in news]
        found[task] = paired_bootstrap(*scores, [new.cluster or new.id for new in news])
    return found


def _short(length: int) -> str:
    """4096 as "4k"; 0 as "any"."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if length >= size:
            return f"{length / size:.3g}{unit}"
    return str(length or "any")


def percent(score: Interval | Difference) -> str:
    """A mean with its 95 % interval, in percent."""
    return f"{100 * score.mean:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"
