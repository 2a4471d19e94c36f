"""The public dataset LongBlocks (utter-project/LongBlocks, arXiv 2605.12227).

It has the columns `COLUMNS` and one `response_<model>` per generator. The `document` of rows from
Institutional Books (56 %) is null: they are dropped and counted, or joined with the user's books.
"""

from collections.abc import Iterator
from pathlib import Path

from dgrpo.data import Books, RowStream, no_document
from dgrpo.text import BadRow, Report, count_tokens

HUB = "utter-project/LongBlocks"
COLUMNS = ("id", "document", "source", "language", "question", "answer")


def load_longblocks(
    path: str | Path = HUB,
    *,
    response: str | None = None,
    books: str | Path | None = None,
    tokenizer=None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    report: Report | None = None,
) -> Iterator[dict]:
    """Yield the rows of LongBlocks that can be used, in bounded memory.

    Args:
        path: the hub dataset, a local copy's folder of parquet files, or one file.
        response: which generator's answer becomes `completion` (`"Qwen3.5-27B"`); None: none.
        books: a folder to take the documents from that the dataset does not ship.
        tokenizer, min_tokens, max_tokens: length limits of the document, by this tokenizer.
        report: where dropped rows are counted and logged.

    Raises ValueError for limits without a tokenizer, and a response that the data does not have.
    """
    if (min_tokens or max_tokens) and tokenizer is None:
        raise ValueError("tokenizer: got None, expected one to measure min_tokens and max_tokens")
    report = report or Report()
    library = Books(books, report) if books else None
    for where, row in RowStream(path, report=report):
        try:
            if isinstance(row, BadRow):
                raise row
            row = _checked(row, library, response)
            if tokenizer is not None:
                row["tokens"] = n = count_tokens(tokenizer, row["document"])
                if n < min_tokens or (max_tokens is not None and n > max_tokens):
                    raise BadRow("too short" if n < min_tokens else "too long", f"{n} tokens")
        except BadRow as problem:
            report.drop(problem, where)
            continue
        report.kept += 1
        yield row
    report.log(report.summary())


def _checked(row: dict, library: Books | None, response: str | None) -> dict:
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise BadRow("missing column", ", ".join(missing))
    row = library.join(row) if library else row
    if row["document"] is None:
        raise no_document(row)
    for name in ("document", "question", "answer"):
        if not isinstance(row[name], str) or not row[name]:
            raise BadRow(f"{name} is empty or not text", repr(row[name])[:80])
    if response is None:
        return row
    column = f"response_{response}"
    if column not in row:
        found = ", ".join(sorted(name for name in row if name.startswith("response_")))
        raise ValueError(f"response: got {response!r}, the data has {found or 'no responses'}")
    if not row[column]:
        raise BadRow(f"{column} is empty")
    return row | {"completion": row[column]}
