"""The log of a run: `metrics.jsonl`, the display, and if asked TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgrpo.distributed import ranks
from dgrpo.extras import whole_file
from dgrpo.trainer.config.run import METRICS
from dgrpo.trainer.metrics.display import Display
from dgrpo.trainer.metrics.rollouts import cut_rollouts


class RunLog:
    """Writes what a run measures. Rank 0 does it all; on the other ranks every method does nothing.

    Args:
        folder: of the run.
        resume_step: of the checkpoint that the run goes on from: later lines of `metrics.jsonl` and
            later rollouts are removed. None for a new run: a folder that has metrics raises.
        total_steps: for the display's time left, if known; may be set anew (`total_steps`).
        tensorboard: also write event files to `folder/tensorboard`.
        wandb: a W&B project to log to as well; `folder/wandb.json` keeps the run's id to resume.
        settings: what W&B shows as the run's configuration.
        live: a live display; None shows one where the output is a terminal, else plain lines.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume_step: int | None = None,
        total_steps: int | None = None,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
        live: bool | None = None,
    ):
        self.folder, self.total_steps = Path(folder), total_steps
        self.active = ranks().first
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        if resume_step is not None:
            cut(path, resume_step)
            cut_rollouts(self.folder, resume_step)
        elif path.exists() and path.stat().st_size:
            raise ValueError(
                f"folder: got {self.folder}, which has the metrics of another run, expected a new "
                "one; resume that run, name another folder, or delete it"
            )
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(self.folder, resume_step) if tensorboard else None
        self._wandb = _wandb(self.folder, wandb, settings) if wandb else None
        self.display = Display(done=resume_step or 0, live=live)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One step's line. Values are numbers, strings or None; what is not finite becomes null."""
        if not self.active:
            return
        record = {"step": step} | {name: plain(value) for name, value in metrics.items()}
        # One write of a whole line: a kill leaves at most an unfinished last one for `cut` to drop.
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        self.display.update(record, self.total_steps)

    def message(self, text: str) -> None:
        """Print above the display."""
        if self.active:
            self.display.message(text)

    def sync(self) -> None:
        """Put what was logged on the disk; call it before a checkpoint."""
        if self.active:
            os.fsync(self._file.fileno())
            if self._tensorboard is not None:
                self._tensorboard.flush()

    def close(self) -> None:
        """End the display and every sink; may be called again."""
        if not self.active:
            return
        self.active = False
        self.display.close()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _require(setting: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{setting}: {setting} cannot be imported ({error}); "
            f"pip install {setting}, or turn {setting} off"
        ) from error


def _tensorboard(folder: Path, resume_step: int | None) -> Any:
    module = _require("tensorboard", "torch.utils.tensorboard")
    purge = None if resume_step is None else resume_step + 1
    return module.SummaryWriter(str(folder / "tensorboard"), purge_step=purge)


def _wandb(folder: Path, project: str, settings: Mapping[str, Any] | None) -> Any:
    known = folder / "wandb.json"
    run = _require("wandb", "wandb").init(
        project=project,
        name=folder.name,
        dir=str(folder),
        id=json.loads(known.read_text())["id"] if known.exists() else None,
        resume="allow",
        config=dict(settings or {}),
    )
    known.write_text(json.dumps({"id": run.id}))
    return run


def plain(value: object) -> object:
    """A metric as a JSON value; what is not finite is null, as JSON has no NaN."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)  # type: ignore[arg-type]  # NumPy's and torch's scalars too
    return number if math.isfinite(number) else None


def cut(path: Path, step: int) -> None:
    """Keep the lines up to `step`, and no unfinished last one; atomic."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
    if len(kept) == len(lines):
        return
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())


def _step(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
