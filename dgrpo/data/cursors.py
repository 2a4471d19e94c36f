"""Positions in a source of rows: random access with a full shuffle, or a pass over files."""

from collections.abc import Sequence

import numpy as np

from dgrpo.data.render import Source
from dgrpo.data.row_stream import RowStream
from dgrpo.data.rows import load_rows
from dgrpo.data.tables import caught
from dgrpo.text import BadRow, Report
from dgrpo.trainer.config import DataSource

BLOCK = 256  # rows shuffled together while streaming


class Shuffled:
    """Random access: every epoch another permutation of all rows."""

    def __init__(self, source: DataSource, seed: list[int], shuffle: bool, report: Report):
        self.rows: Sequence[dict] = source.rows if isinstance(source, Source) else None
        if self.rows is None:
            self.rows = load_rows(
                source.path,
                split=source.split,
                columns=source.columns,
                options=source.options,
                report=report,
            )
        self.seed, self.shuffle, self.size = seed, shuffle, len(self.rows)
        self.name = source.name or source.path or "rows"
        self.kept = 0
        self._start(0, 0)

    def _start(self, epoch: int, offset: int) -> None:
        self.epoch, self.offset, self.order = epoch, offset, np.arange(self.size)
        if self.shuffle:
            self.order = np.random.default_rng([*self.seed, epoch]).permutation(self.size)

    def next(self) -> tuple[str, dict | BadRow] | None:
        """The next row and its place; None at the end of an epoch."""
        if self.offset >= self.size:
            self._start(self.epoch + 1, 0)
            return None
        index = int(self.order[self.offset])
        self.offset += 1
        return self.at(index)

    def at(self, index: int) -> tuple[str, dict | BadRow]:
        """A row by its number, and its place."""
        where = self.rows.where(index) if hasattr(self.rows, "where") else f"{self.name}:{index}"
        try:
            return where, caught(self.rows.__getitem__, index)
        except Exception as error:  # of the user's own reader
            return where, BadRow("unreadable row", f"{type(error).__name__}: {error}")

    def state(self) -> dict:
        return {"epoch": self.epoch, "offset": self.offset, "size": self.size, "kept": self.kept}

    def load(self, state: dict) -> None:
        self._start(state["epoch"], state["offset"])
        self.kept = state["kept"]


class Pass:
    """Streaming: blocks of rows in file order, shuffled within a block."""

    size = None

    def __init__(self, source: DataSource, seed: list[int], shuffle: bool, report: Report):
        self.source, self.seed, self.shuffle, self.report = source, seed, shuffle, report
        self.name, self.kept = source.name or source.path, 0
        self._start(0, None)

    def _start(self, epoch: int, state: dict | None) -> None:
        self.epoch, self.blocks, self.offset = epoch, 0, 0
        self.stream = RowStream(
            self.source.path,
            split=self.source.split,
            columns=self.source.columns,
            report=self.report,
            seed=sum(s * 1_000_003**i for i, s in enumerate(self.seed)) % 2**31,
            epoch=epoch,
            state=state,
        )
        self.iterator = iter(self.stream)
        self.before = self.stream.state()
        self.block: list = []

    def _fill(self) -> None:
        self.before, self.offset = self.stream.state(), 0
        rows = [row for _, row in zip(range(BLOCK), self.iterator, strict=False)]
        order = np.random.default_rng([*self.seed, self.epoch, self.blocks]).permutation(len(rows))
        self.block = [rows[i] for i in order] if self.shuffle else rows
        self.blocks += 1

    def next(self) -> tuple[str, dict | BadRow] | None:
        if self.offset >= len(self.block):
            self._fill()
            if not self.block:
                self._start(self.epoch + 1, None)
                return None
        self.offset += 1
        return self.block[self.offset - 1]

    def state(self) -> dict:
        counts = {"epoch": self.epoch, "block": self.blocks, "offset": self.offset}
        return counts | {"stream": self.before, "kept": self.kept}

    def load(self, state: dict) -> None:
        self._start(state["epoch"], state["stream"])
        if state["block"]:
            self.blocks = state["block"] - 1
            self._fill()
        self.offset, self.kept = state["offset"], state["kept"]
