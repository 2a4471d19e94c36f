"""Rows: JSONL, JSON, parquet, CSV, folders of them, saved datasets, the hub, or a function.

`load_rows` gives random access to everything, as a full shuffle needs; one pass in bounded memory
is `dgrpo.data.row_stream.RowStream`. In both a row or a file that cannot be read is a `BadRow`, not
the end.
"""

import bisect
import glob
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from dgrpo.data.csv_rows import DELIMITERS, Cells
from dgrpo.text import BadRow, Report

ENDS = 2**20  # bytes of each end of a file that its fingerprint reads
SUFFIXES = (".jsonl", ".json", ".parquet", *DELIMITERS)


def load_rows(
    path: str | Path,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
    options: dict | None = None,
    report: Report | None = None,
) -> Sequence[dict]:
    """Random access to all rows at `path`; `rows[i]` raises BadRow where row i is unreadable.

    Args:
        path: a `.jsonl`, `.json`, `.parquet`, `.csv` or `.tsv` file, a glob, a folder of
            such files, a folder written by `Dataset.save_to_disk`, `"module:function"` (called
            with `options`, returns a sequence of dicts), or a dataset's name on the hub.
        split: the split of a hub dataset or of a saved `DatasetDict`.
        columns: `{our name: name in the file}`; the other columns keep their names.
        options: keyword arguments of a function.
        report: files that cannot be opened are counted here.

    Raises:
        ValueError: nothing readable at `path`.
    """
    report = report or Report()
    path = str(path)
    if is_function(path):
        tables = [_Table(_call(path, options or {}), path)]
    elif files := row_files(path):
        tables = _open_all(files, report)
    elif os.path.isdir(path):
        tables = [_Table(_saved(path, split), path)]
    elif looks_local(path):
        raise ValueError(
            f"path: got {path!r}, which does not exist; expected a file ({', '.join(SUFFIXES)}), "
            "a folder of them, module:function or a dataset on the hub"
        )
    else:
        import datasets

        tables = [_Table(datasets.load_dataset(path, split=split), f"{path}[{split}]")]
    return _Rows(tables, columns or {})


def row_files(path: str | Path) -> list[str]:
    """The row files that a file name, a glob or a folder (without hidden ones) stands for."""
    path = str(path)
    if os.path.isdir(path):
        if any(os.path.exists(os.path.join(path, n)) for n in ("state.json", "dataset_dict.json")):
            return []  # a folder of Dataset.save_to_disk
        found = (p for p in Path(path).rglob("*") if p.suffix in SUFFIXES and p.is_file())
        return sorted(
            str(p) for p in found if not any(n[0] == "." for n in p.relative_to(path).parts)
        )
    return sorted(p for p in glob.glob(path) if p.endswith(SUFFIXES))


def fingerprint(path: str | Path) -> str:
    """A short hash of the row files' sizes and of both ends of each; "" where there are none.

    The middle of a large file is not read: files of many GB are told apart at once.
    """
    found = hashlib.sha256()
    files = row_files(path) if str(path) else []
    for file in files:
        with open(file, "rb") as stream:
            size = os.path.getsize(file)
            found.update(f"{size} ".encode() + stream.read(ENDS))
            stream.seek(max(0, size - ENDS))
            found.update(stream.read(ENDS))
    return found.hexdigest()[:16] if files else ""


def is_function(path: str) -> bool:
    """Whether `path` names a Python function, `package.module:function`."""
    module, _, name = path.partition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a file, not as a hub dataset."""
    return path.startswith((".", "/", "~")) or path.endswith(SUFFIXES) or path.count("/") > 1


def _call(path: str, options: dict) -> Sequence[dict]:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"path: got {path!r}, which cannot be imported: {error}") from error
    rows = function(**options)
    return rows if hasattr(rows, "__getitem__") else list(rows)


def _saved(path: str, split: str):
    import datasets

    saved = datasets.load_from_disk(path)
    return saved[split] if isinstance(saved, datasets.DatasetDict) else saved


def _open_all(files: list[str], report: Report) -> list:
    tables = []
    for file in files:
        try:
            tables.append(open_table(file))
        except Exception as error:  # whatever a reader raises on a broken file
            report.drop(unreadable(file, error))
    if not tables:
        raise ValueError(f"path: none of the {len(files)} files can be read: {files[:3]}")
    return tables


def unreadable(file: str | Path, error: Exception) -> BadRow:
    """The problem of a file that cannot be opened or read to its end."""
    return BadRow("unreadable file", f"{type(error).__name__}: {error}", str(file))


def open_table(file: str):
    """One file's rows. Raises whatever its reader raises where it is broken."""
    if file.endswith(".jsonl"):
        return _Lines(file)
    if file.endswith(tuple(DELIMITERS)):
        return Cells(file)
    if file.endswith(".json"):
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
        if isinstance(content, dict):  # {"data": [...]}, or one object a key
            lists = [v for v in content.values() if isinstance(v, list)]
            content = lists[0] if len(lists) == 1 else list(content.values())
        return _Table(content, file)
    import datasets
    import pyarrow.parquet

    pyarrow.parquet.read_metadata(file)  # a broken file fails here, before a cache is written
    return _Table(datasets.Dataset.from_parquet(file), file)


class _Table:
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
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        with open(self.name, "rb") as stream:
            stream.seek(start)
            return parse_line(stream.read(end - start), self.where(index))

    def where(self, index: int) -> str:
        """File and line, from 1."""
        return f"{self.name}:{index + 1}"


def parse_line(line: bytes, where: str) -> dict:
    """One line of JSONL. Raises BadRow for anything but one object in UTF-8."""
    try:
        row = json.loads(line)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise BadRow("bad JSON", str(error), where) from None
    if not isinstance(row, dict):
        raise BadRow("not an object", type(row).__name__, where)
    return row


class _Rows(Sequence):
    """Tables end to end, their columns renamed."""

    def __init__(self, tables: list, columns: dict[str, str]):
        self.tables, self.columns = tables, columns
        self.ends = np.cumsum([len(t) for t in tables]).tolist()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        table, row = self._find(index)
        return renamed(table[row], self.columns, self.where(index))

    def where(self, index: int) -> str:
        """File and row (JSONL, CSV: line, from 1) of an index, for messages."""
        table, row = self._find(index)
        return table.where(row)

    def _find(self, index: int):
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}, expected one below {len(self)} rows")
        index %= len(self)
        number = bisect.bisect_right(self.ends, index)
        return self.tables[number], index - (self.ends[number - 1] if number else 0)


def caught(read: Callable[..., dict], *arguments) -> dict | BadRow:
    """The row that `read` returns, or the BadRow that it raises."""
    try:
        return read(*arguments)
    except BadRow as problem:
        return problem


def renamed(row: dict, columns: dict[str, str], where: str) -> dict:
    """The row with `columns` ({our name: theirs}) renamed. Raises BadRow where one is missing."""
    if not columns:
        return row
    missing = [name for name in columns.values() if name not in row]
    if missing:
        raise BadRow("missing column", ", ".join(missing), where)
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}
