"""One pass over rows in bounded memory, from a position that can be saved."""

import os
from collections.abc import Iterator
from itertools import islice

import numpy as np

from dgrpo.data.rows import is_function, looks_local, renamed, row_files
from dgrpo.data.tables import caught, open_table, parse_line, unreadable
from dgrpo.text import BadRow, Report


class RowStream:
    """One pass over files or a hub dataset, in bounded memory: `(where, row)` or `(where, BadRow)`.

    Args:
        path, split, columns, report: as for `load_rows`; no function.
        seed, epoch: the order of the files.
        state: where to go on, from `state()`.
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
            raise ValueError(
                f"path: got {self.path!r}, expected row files or a hub dataset for streaming=True"
            )
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
        for where, row in self._hub_rows() if self.hub is not None else self._file_rows():
            bad = isinstance(row, BadRow)
            yield where, row if bad else caught(renamed, row, self.columns, where)

    def _hub_rows(self):
        for row in self.hub:
            self.row += 1
            yield f"{self.path}:{self.row - 1}", row

    def _file_rows(self):
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
