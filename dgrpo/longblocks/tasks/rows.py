"""The rows of all tasks: their columns, and the folder of parquet files that holds them."""

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dgrpo.text import Report

META = ".make"  # hidden, so that reading the folder reads the rows alone
# Columns that only some rewards read, with what they hold in the other rows.
VERIFIERS = {
    "aliases": [],
    "items": [],
    "distractors": [],
    "passages": [],
    "passage_ids": [],
    "answerable": True,
    "points": [],
    "form": "",
    "headings": [],
    "min_words": 0,
    "max_words": 0,
    "hops": 1,
}


@dataclass(frozen=True)
class MakeResult:
    """What was made: rows written, rows that could not be made, and the files."""

    rows: int
    report: Report
    files: list[Path]


def row(
    *,
    document: str,
    question: str,
    answer: str,
    family: str,
    task: str,
    reward: str,
    evidence: str,
    reference: str = "",
    depths: Sequence[float] = (),
    tokens: int = 0,
    **verifiers,
) -> dict:
    """A row of the published form, without id and seed.

    Args:
        reward: name of a function of `dgrpo.rewards`.
        evidence: the text that proves the answer.
        reference: a completion that earns the whole reward; empty: the answer.
        depths: where in the document the evidence lies, in [0, 1].
        tokens: length of document and question; 0: not measured.
        verifiers: some of the columns `VERIFIERS`.
    """
    unknown = verifiers.keys() - VERIFIERS
    assert not unknown, unknown
    return {
        "document": document,
        "source": "dgrpo",
        "language": "en",
        "question": question,
        "answer": answer,
        "response_reference": reference or answer,
        "family": family,
        "task": task,
        "reward": f"dgrpo.rewards:{reward}",
        **copy.deepcopy(VERIFIERS),
        **verifiers,
        "evidence": evidence,
        "privileged": reference or answer,
        "depths": list(depths),
        "tokens": tokens,
    }


def claim(folder: Path, settings: dict) -> None:
    """Make the folder, and note the settings of its data; raise where it has data of others."""
    file = folder / META / "settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(json.dumps(settings))
    if file.exists() and json.loads(file.read_text()) != known:
        raise ValueError(
            f"out: {folder} holds data of other settings ({file}); name another folder or empty it"
        )
    file.write_text(json.dumps(known, indent=1))


def part(folder: Path, number: int) -> Path:
    """The file of a number."""
    return folder / f"part-{number:05d}.parquet"


def write_part(folder: Path, number: int, rows: list[dict]) -> Path:
    """Write a file, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    file = part(folder, number)
    partial = file.with_suffix(".partial")
    table = pyarrow.Table.from_pylist(rows, schema=_schema())
    pyarrow.parquet.write_table(table, partial, compression="zstd", row_group_size=16)
    os.replace(partial, file)
    return file


def _schema():
    import pyarrow as pa

    text, texts, whole = pa.string(), pa.list_(pa.string()), pa.int64()
    kinds = {
        **dict.fromkeys("id document source language question answer".split(), text),
        **dict.fromkeys("response_reference family task reward".split(), text),
        **dict.fromkeys("aliases items distractors passages passage_ids".split(), texts),
        "answerable": pa.bool_(),
        "points": pa.list_(texts),
        "form": text,
        "headings": texts,
        **dict.fromkeys("min_words max_words hops".split(), whole),
        "evidence": text,
        "privileged": text,
        "depths": pa.list_(pa.float64()),
        "tokens": whole,
        "seed": whole,
    }
    return pa.schema(list(kinds.items()))
