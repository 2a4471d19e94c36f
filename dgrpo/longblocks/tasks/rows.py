"""The rows of all tasks: their columns, and the folder of parquet files that holds them."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

from dgrpo.extras import whole_file
from dgrpo.text import Report

META = ".make"  # hidden, so that reading the folder reads the rows alone
# The columns of a row but its id and seed, with what they hold where a task says nothing else.
COLUMNS = {
    **{"document": "", "source": "dgrpo", "language": "en", "question": "", "answer": ""},
    **{"response_reference": "", "family": "", "task": "", "reward": ""},
    **{"aliases": [], "items": [], "distractors": [], "passages": [], "passage_ids": []},
    **{"answerable": True, "points": [], "form": "", "headings": []},
    **{"min_words": 0, "max_words": 0, "hops": 1},
    # the text that proves the answer, its places in the document in [0, 1], tokens of document and
    # question (0: not measured)
    **{"evidence": "", "privileged": "", "depths": [], "tokens": 0},
}


@dataclass(frozen=True)
class MakeResult:
    """What was made: rows written, rows that could not be made, and the files."""

    rows: int
    report: Report
    files: list[Path]


def row(*, answer: str, reward: str, reference: str = "", **columns) -> dict:
    """A row of the published form, without id and seed.

    Args:
        reward: name of a function of `dgrpo.rewards`.
        reference: a completion that earns the whole reward; empty: the answer.
        columns: others of `COLUMNS`.
    """
    shown = dict.fromkeys(("response_reference", "privileged"), reference or answer)
    columns |= {"answer": answer, "reward": f"dgrpo.rewards:{reward}", **shown}
    assert columns.keys() <= COLUMNS.keys(), columns.keys() - COLUMNS
    return copy.deepcopy(COLUMNS) | columns


def claim(folder: Path, settings: dict) -> None:
    """Make the folder, and note the settings of its data; raise where it has data of others."""
    file = folder / META / "settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(json.dumps(settings))
    if file.exists() and json.loads(file.read_text()) != known:
        others = f"holds data of other settings ({file})"
        raise ValueError(f"out: {folder} {others}; name another folder or empty it")
    file.write_text(json.dumps(known, indent=1))


def part(folder: Path, number: int) -> Path:
    """The file of that number."""
    return folder / f"part-{number:05d}.parquet"


def write_part(folder: Path, number: int, rows: list[dict]) -> Path:
    """Write a file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet

    text, whole = pa.string(), pa.int64()
    kinds = {str: text, list: pa.list_(text), bool: pa.bool_(), int: whole}
    fields = {name: kinds[type(value)] for name, value in COLUMNS.items()}
    fields |= {"points": pa.list_(pa.list_(text)), "depths": pa.list_(pa.float64())}
    schema = pa.schema([("id", text), *fields.items(), ("seed", whole)])
    file, table = part(folder, number), pa.Table.from_pylist(rows, schema=schema)
    with whole_file(file) as partial:
        pa.parquet.write_table(table, partial, compression="zstd", row_group_size=16)
    return file
