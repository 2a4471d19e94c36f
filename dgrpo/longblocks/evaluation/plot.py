"""The heat map of accuracy by depth and length."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def draw_heatmap(grid: np.ndarray, lengths: Sequence[str], title: str, path: str | Path) -> None:
    """Write a PNG.

    Args:
        grid: (depths, lengths) scores in [0, 1], NaN where there is none (grey).
        lengths: names of the columns.
        title: above the map.
        path: the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = grid.shape
    figure = Figure(figsize=(2.4 + 0.8 * columns, 1.6 + 0.36 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="RdYlGn")
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(columns), lengths)
    axes.set_yticks(np.arange(rows + 1) - 0.5, [f"{k / rows:.0%}" for k in range(rows + 1)])
    axes.set_xlabel("length in tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label="score")
    figure.savefig(path, dpi=120)
