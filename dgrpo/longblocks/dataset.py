"""The public dataset LongBlocks (utter-project/LongBlocks, arXiv 2605.12227).

It has the columns `COLUMNS` and one `response_<model>` per generator. About 56 % of its rows come
from Institutional Books, whose licence does not allow the text to be passed on: their `document` is
null. Such rows are dropped and counted, or joined again with the books in a folder of the user's.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from dgrpo.data.books import Books, no_document
from dgrpo.data.row_stream import RowStream
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
    languages: tuple[str, ...] = (),
    report: Report | None = None,
    log: Callable[[str], None] | None = None,
) -> Iterator[dict]:
    """The rows of LongBlocks that can be used, one by one, in bounded memory.

    Args:
        path: the hub dataset, a local copy's folder of parquet files, or one file.
        response: which generator's answer becomes `completion` (`"Qwen3.5-27B"`); None: none.
        books: a folder to take the documents from that the dataset does not ship.
        tokenizer, min_tokens, max_tokens: length limits of the document, by this tokenizer.
        languages: only these.
        report, log: where dropped rows are counted and logged; see `Report`.

    Raises:
        ValueError: limits without a tokenizer, or a response column that the data does not have.
    """
    if (min_tokens or max_tokens) and tokenizer is None:
        raise ValueError("tokenizer: got None, expected one to measure min_tokens and max_tokens")
    report = report or Report(log)
    library = Books(books, report) if books else None
    for where, row in RowStream(path, report=report):
        try:
            if isinstance(row, BadRow):
                raise row
            row = _checked(row, library, response)
            if languages and row["language"] not in languages:
                continue
            if tokenizer is not None:
                _measure(row, tokenizer, min_tokens, max_tokens)
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
    if row["document"] is None:
        if library is None:
            raise no_document(row)
        row = library.join(row)
    for name in ("document", "question", "answer"):
        if not isinstance(row[name], str) or not row[name]:
            raise BadRow(f"{name} is empty or not text", repr(row[name])[:80])
    if response is None:
        return row
    column = response if response.startswith("response_") else f"response_{response}"
    if column not in row:
        found = ", ".join(sorted(name for name in row if name.startswith("response_")))
        raise ValueError(f"response: got {response!r}, the data has {found or 'no responses'}")
    if not row[column]:
        raise BadRow(f"{column} is empty")
    return row | {"completion": row[column]}


def _measure(row: dict, tokenizer, shortest: int, longest: int | None) -> None:
    text = row["document"]
    if len(text.encode()) < shortest:  # a token is at least a byte
        raise BadRow("too short", f"fewer than {shortest} tokens")
    n = count_tokens(tokenizer, text)
    if n < shortest or (longest is not None and n > longest):
        raise BadRow("too short" if n < shortest else "too long", f"{n} tokens")
    row["tokens"] = n
