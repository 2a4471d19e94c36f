"""Positions in a source of rows that can be saved: a full shuffle, or a pass in bounded memory."""

import os
from collections.abc import Iterator
from itertools import islice

import numpy as np

from dgrpo.data.render import Source
from dgrpo.data.rows import is_function, load_rows, looks_local, renamed, row_files
from dgrpo.data.tables import Table, caught, open_table, parse_line, unreadable
from dgrpo.text import BadRow, Report
from dgrpo.trainer.config import DataSource

BLOCK = 256  # rows shuffled together while streaming


class Shuffled:
    """Random access: every epoch another permutation of all rows."""

    def __init__(self, source: DataSource, seed: list[int], shuffle: bool, report: Report):
        if isinstance(source, Source) and source.rows is not None:
            name = source.name or source.path or "rows"
            self.rows = source.rows if hasattr(source.rows, "where") else Table(source.rows, name)
        else:
            self.rows = load_rows(
                source.path,
                split=source.split,
                columns=source.columns,
                options=source.options,
                report=report,
            )
        self.seed, self.shuffle, self.size, self.kept = seed, shuffle, len(self.rows), 0
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
        where = self.rows.where(index)
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
        self.kept = 0
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


class RowStream:
    """One pass over files or a hub dataset, in bounded memory: `(where, row)` or `(where, BadRow)`.

    The arguments are those of `load_rows` (but no function), `seed` and `epoch` for the order of
    the files, and the `state()` to go on from.
    """

    def __init__(
        self, path, *, split="train", columns=None, report=None, seed=0, epoch=0, state=None
    ):
        self.path, self.columns, self.report = str(path), columns or {}, report or Report()
        self.files = row_files(path)
        self.file, self.row = (state["file"], state["row"]) if state else (0, 0)
        self.hub = None
        if self.files:
            order = np.random.default_rng([seed, epoch]).permutation(len(self.files))
            self.files = [self.files[i] for i in order]
        elif looks_local(self.path) or is_function(self.path):
            expected = "expected row files or a hub dataset for streaming=True"
            raise ValueError(f"path: got {self.path!r}, {expected}")
        else:
            import datasets

            self.hub = datasets.load_dataset(self.path, split=split, streaming=True)
            self.hub = self.hub.shuffle(seed=seed + epoch, buffer_size=1)  # the order of its files
            if state:
                self.hub.load_state_dict(state["hub"])

    def state(self) -> dict:
        """Where the pass stands, as plain numbers."""
        hub = self.hub.state_dict() if self.hub is not None else None
        return {"file": self.file, "row": self.row, "hub": hub}

    def __iter__(self) -> Iterator[tuple[str, dict | BadRow]]:
        for where, row in self._rows():
            bad = isinstance(row, BadRow)
            yield where, row if bad else caught(renamed, row, self.columns, where)

    def _rows(self):
        for row in () if self.hub is None else self.hub:
            self.row += 1
            yield f"{self.path}:{self.row - 1}", row
        while self.file < len(self.files):
            file = self.files[self.file]
            reader = READERS.get(os.path.splitext(file)[1], _read_table)
            try:
                for where, row in reader(file, self.row):
                    self.row += 1
                    yield where, row
            except Exception as error:  # whatever a reader raises on a broken file
                self.report.drop(unreadable(file, error))
            self.file, self.row = self.file + 1, 0


def _read_lines(file: str, skip: int):
    with open(file, "rb") as stream:
        for number, line in islice(enumerate(stream, 1), skip, None):
            where = f"{file}:{number}"
            yield where, caught(parse_line, line, where)


def _read_table(file: str, skip: int):
    table = open_table(file)
    for index in range(skip, len(table)):
        yield table.where(index), caught(table.__getitem__, index)


def _read_parquet(file: str, skip: int):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        groups, row = list(range(parquet.num_row_groups)), skip
        while groups and skip >= parquet.metadata.row_group(groups[0]).num_rows:
            skip -= parquet.metadata.row_group(groups.pop(0)).num_rows
        for batch in parquet.iter_batches(batch_size=16, row_groups=groups):
            for found in batch.slice(min(skip, len(batch))).to_pylist():
                row += 1
                yield f"{file}:{row}", found
            skip = max(0, skip - len(batch))


READERS = {".jsonl": _read_lines, ".parquet": _read_parquet}
