"""The curves of a run in one PNG."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from dgrpo.extras import whole_file
from dgrpo.trainer.report.panels import ceiling, panels, points, smooth
from dgrpo.trainer.report.read import Stage

_COLUMNS = 3


def draw(stages: list[Stage], path: Path) -> None:
    """Draws every metric of every stage over its steps, of many also their moving mean."""
    from matplotlib.figure import Figure  # without pyplot there is no display to ask for

    rows = [max(1, math.ceil(len(panels(stage.series)) / _COLUMNS)) for stage in stages]
    figure = Figure(figsize=(12, 2.5 * sum(rows) + 0.4 * len(stages)), layout="constrained")
    parts = figure.subfigures(len(stages), 1, height_ratios=rows, squeeze=False)[:, 0]
    for stage, part, count in zip(stages, parts, rows, strict=True):
        _draw_stage(stage, part, count)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _draw_stage(stage: Stage, part, rows: int) -> None:
    last = f"step {stage.steps[-1]}" if stage.steps else "no step yet"
    part.suptitle(f"{stage.name}, {last}", fontsize="medium", fontweight="bold")
    axes = part.subplots(rows, _COLUMNS, squeeze=False).flat
    drawn = panels(stage.series)
    for axis, panel in itertools.zip_longest(axes, drawn):
        if panel is None:
            axis.set_axis_off()
            continue
        axis.set_title(panel.title, fontsize="small")
        axis.tick_params(labelsize="x-small")
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        tops, cut = [], False
        for number, (name, label) in enumerate(panel.lines):
            steps, values = points(stage.steps, stage.series[name])
            top = ceiling(name, values)
            mean, color = smooth(values, top), f"C{number % 10}"
            raw = {"alpha": 0.3} if mean else {"label": label}
            marker = "." if len(values) < 20 else None
            axis.plot(steps, values, color=color, linewidth=1, marker=marker, **raw)
            if mean:
                axis.plot(steps, mean, color=color, linewidth=1.5, label=label)
            tops.append(max(values) if top is None else top)
            cut |= top is not None
        if cut:
            axis.set_ylim(top=max(tops))
        if len(panel.lines) > 1:
            axis.legend(fontsize="x-small", frameon=False, ncols=2)
