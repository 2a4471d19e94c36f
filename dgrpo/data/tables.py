"""One file of rows by number: JSONL and CSV by their lines, JSON and parquet as a whole."""

import csv
import io
import json
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np

from dgrpo.text import BadRow

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def unreadable(file: str | Path, error: Exception) -> BadRow:
    """The problem of a file that cannot be opened or read to its end."""
    return BadRow("unreadable file", f"{type(error).__name__}: {error}", str(file))


def caught(read: Callable[..., dict], *arguments) -> dict | BadRow:
    """The row that `read` returns, or the BadRow that it raises."""
    try:
        return read(*arguments)
    except BadRow as problem:
        return problem


def open_table(file: str):
    """One file's rows. Raises whatever its reader raises where it is broken."""
    if file.endswith(".jsonl"):
        return _Lines(file)
    if file.endswith(tuple(DELIMITERS)):
        return _Cells(file)
    if file.endswith(".json"):
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
        if isinstance(content, dict):  # {"data": [...]}, or one object a key
            lists = [v for v in content.values() if isinstance(v, list)]
            content = lists[0] if len(lists) == 1 else list(content.values())
        return Table(content, file)
    import datasets
    import pyarrow.parquet

    pyarrow.parquet.read_metadata(file)  # a broken file fails here, before a cache is written
    return Table(datasets.Dataset.from_parquet(file), file)


class Table:
    """A list or a dataset; every row a dict."""

    def __init__(self, rows, name: str):
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        if not isinstance(row, dict):
            raise BadRow("not an object", type(row).__name__, self.where(index))
        return row

    def where(self, index: int) -> str:
        """Name and row, from 0."""
        return f"{self.name}:{index}"


class _Lines:
    """A JSONL file by line; its line offsets (8 bytes per line) are found in one pass."""

    def __init__(self, file: str):
        self.name = file
        with open(file, "rb") as stream:
            self.offsets = np.fromiter(accumulate(map(len, stream), initial=0), np.int64)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict:
        return parse_line(self.read(index, index + 1), self.where(index))

    def read(self, first: int, end: int) -> bytes:
        """Lines first to end - 1."""
        start, stop = int(self.offsets[first]), int(self.offsets[end])
        with open(self.name, "rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def where(self, index: int) -> str:
        """File and line, from 1."""
        return f"{self.name}:{index + 1}"


class _Cells(_Lines):
    """A CSV or TSV file by row: a cell is text (007 stays 007), an empty or absent one null."""

    def __init__(self, file: str):
        super().__init__(file)
        csv.field_size_limit(sys.maxsize)  # a document is longer than the module's 128 KB
        self.delimiter = DELIMITERS[file[-4:]]
        self.header: list[str] = []
        spans, end = [], 0  # first line of a row and the line after its last, from 0
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream:
            reader = csv.reader(stream, delimiter=self.delimiter)
            while True:
                first = end
                try:
                    cells = next(reader, None)
                except csv.Error:
                    if not self.header:
                        raise
                    cells = [""]  # reported when the row is read
                if cells is None:
                    break
                end = reader.line_num
                if cells and self.header:
                    spans.append((first, end))
                elif cells:
                    self.header = cells
        if not self.header:
            raise ValueError("no header: the first line names the columns")
        self.spans = np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict:
        try:
            text = self.read(*self.spans[index]).decode("utf-8")
            lines = io.StringIO(text, newline="\n")
            (cells,) = csv.reader(lines, delimiter=self.delimiter, strict=True)
        except (ValueError, csv.Error) as error:
            raise BadRow("bad CSV", str(error), self.where(index)) from None
        if len(cells) > len(self.header):
            counts = f"{len(cells)} cells, the header has {len(self.header)}"
            raise BadRow("bad CSV", counts, self.where(index))
        cells += [""] * (len(self.header) - len(cells))
        return {name: cell or None for name, cell in zip(self.header, cells, strict=True)}

    def where(self, index: int) -> str:
        """File and line of a row."""
        return f"{self.name}:{self.spans[index, 0] + 1}"


def parse_line(line: bytes, where: str) -> dict:
    """One line of JSONL. Raises BadRow for anything but one object in UTF-8."""
    try:
        row = json.loads(line)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise BadRow("bad JSON", str(error), where) from None
    if not isinstance(row, dict):
        raise BadRow("not an object", type(row).__name__, where)
    return row
