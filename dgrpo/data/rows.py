"""Random access to rows: JSONL, JSON, parquet, CSV, saved datasets, the hub, or a function."""

import bisect
import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dgrpo.data.tables import DELIMITERS, Table, open_table, unreadable
from dgrpo.extras import load_function
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
        split: of a hub dataset or of a saved `DatasetDict`.
        columns: `{our name: name in the file}`; the other columns keep their names.
        report: counts files that cannot be opened; ValueError where all are.
    """
    report = report or Report()
    path = str(path)
    if is_function(path):
        rows = load_function("path", path)(**options or {})
        tables = [Table(rows if hasattr(rows, "__getitem__") else list(rows), path)]
    elif files := row_files(path):
        tables = []
        for file in files:
            try:
                tables.append(open_table(file))
            except Exception as error:  # whatever a reader raises on a broken file
                report.drop(unreadable(file, error))
        if not tables:
            raise ValueError(f"path: none of the {len(files)} files can be read: {files[:3]}")
    elif os.path.isdir(path):
        import datasets

        saved = datasets.load_from_disk(path)
        tables = [Table(saved[split] if isinstance(saved, datasets.DatasetDict) else saved, path)]
    elif looks_local(path):
        kinds = (
            f"a file ({', '.join(SUFFIXES)}), a folder of them, module:function or a hub dataset"
        )
        raise ValueError(f"path: got {path!r}, which does not exist; expected {kinds}")
    else:
        import datasets

        tables = [Table(datasets.load_dataset(path, split=split), f"{path}[{split}]")]
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
    """A short hash of the row files' sizes and both ends; "" where there are none.

    Large files are told apart at once, as their middle is not read.
    """
    found, files = hashlib.sha256(), row_files(path) if str(path) else []
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


class _Rows(Sequence):
    """Tables end to end, their columns renamed."""

    def __init__(self, tables: list, columns: dict[str, str]):
        self.tables, self.columns = tables, columns
        self.ends = np.cumsum([len(t) for t in tables]).tolist()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        table, row = self._find(index)
        return renamed(table[row], self.columns, self.where(index))

    def where(self, index: int) -> str:
        """File and row (JSONL, CSV: line, from 1) of an index, for messages."""
        table, row = self._find(index)
        return table.where(row)

    def _find(self, index: int):
        index = range(len(self))[index]  # from the end too; IndexError beyond it
        number = bisect.bisect_right(self.ends, index)
        return self.tables[number], index - (self.ends[number - 1] if number else 0)


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
