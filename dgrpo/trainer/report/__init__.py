"""`dgrpo report RUN [RUN ...]`: the curves of runs as a PNG, and one page to read them on.

The page is a single file without any outside resource: it opens from a disk, offline. It shows the
settings, how the runs went, the curves of all of them in the same charts, and the rollouts that
they wrote, every token coloured by its KL to the teacher, its advantage, its clipping and whatever
else was recorded of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from dgrpo.extras import whole_file
from dgrpo.trainer.report.curves import draw
from dgrpo.trainer.report.page import make_page
from dgrpo.trainer.report.read import Stage, read_run


class Report(NamedTuple):
    """The files of a report."""

    curves: Path
    page: Path


def write_report(
    *run_dirs: str | Path, out: str | Path | None = None, page_bytes: int = 24 * 2**20
) -> Report:
    """Write `curves.png` and `report.html` of one or several runs, finished or not.

    Args:
        run_dirs: folders of runs, each with `metrics.jsonl`; or with sub-folders that are the
            stages of a run.
        out: the folder to write to; None: that of the first run.
        page_bytes: about how many bytes of rollouts the page holds; of more, an even choice over
            the steps.

    Raises:
        ValueError: there is no run in a folder.
    """
    if not run_dirs:
        raise ValueError("run_dirs: got none, expected the folder of at least one run")
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in run_dirs))
    names = distinct(folders)
    stages: list[Stage] = []
    for folder, name in zip(folders, names, strict=True):
        found = read_run(folder)
        found[-1].shown = True
        for stage in found if len(folders) > 1 else ():
            stage.name = name if len(found) == 1 else f"{name}/{stage.name}"
        stages += found
    target = Path(run_dirs[0] if out is None else out)
    target.mkdir(parents=True, exist_ok=True)
    curves, page = target / "curves.png", target / "report.html"
    draw(stages, curves)
    title = " · ".join(names) if len(names) < 5 else f"{len(names)} runs"
    with whole_file(page) as temporary:
        temporary.write_text(make_page(title, stages, page_bytes), encoding="utf-8")
    return Report(curves, page)


def distinct(folders: list[Path]) -> list[str]:
    """The last part of each path; where some are alike, their paths below the common folder."""
    if len({folder.name for folder in folders}) == len(folders):
        return [folder.name for folder in folders]
    common = os.path.commonpath([folder.parent for folder in folders])
    return [str(folder.relative_to(common)) for folder in folders]
