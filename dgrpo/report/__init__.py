"""`dgrpo report RUN`: the curves of a run as a PNG, and one page on which to read its rollouts.

The page is a single file without any outside resource: it opens from a disk, offline. It shows the
curves and the rollouts that the run wrote, every token coloured by its KL to the teacher, its
advantage, its clipping and whatever else was recorded of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from dgrpo.report.curves import draw
from dgrpo.report.page import make_page
from dgrpo.report.read import read_run


class Report(NamedTuple):
    """The files of a report."""

    curves: Path
    page: Path


def write_report(run_dir: str | Path, *, page_bytes: int = 24 * 2**20) -> Report:
    """Writes `curves.png` and `report.html` into a run's folder, finished or not.

    Args:
        run_dir: a run's folder, with `metrics.jsonl`; or one whose sub-folders are the stages of a
            run.
        page_bytes: about how many bytes of rollouts the page holds; of more, an even choice over
            the steps.

    Raises:
        ValueError: there is no run in the folder.
    """
    folder = Path(run_dir)
    stages = read_run(folder)
    curves, page = folder / "curves.png", folder / "report.html"
    draw(stages, curves)
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text(make_page(folder.resolve().name, stages, page_bytes), encoding="utf-8")
    os.replace(temporary, page)
    return Report(curves, page)
