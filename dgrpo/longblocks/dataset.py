"""The public dataset LongBlocks (utter-project/LongBlocks, arXiv 2605.12227).

Columns ``id, document, source, language, question, answer`` and one ``response_<model>`` a
generator. About 56 % of its rows come from Institutional Books, whose licence does not allow the
text to be passed on: their ``document`` is null. Such rows are dropped and counted, or joined again
with the books in a folder of the user's.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from dgrpo.data.passes import RowStream
from dgrpo.text.problems import BadRow, Report

HUB = "utter-project/LongBlocks"
COLUMNS = ("id", "document", "source", "language", "question", "answer")


class Books:
    """Texts by identifier, from a folder of the user's.

    Text files (``<identifier>.txt``, ``.md``) are books of that identifier. Parquet files hold one
    book a row, as Institutional Books is published: the identifier in ``barcode_src``,
    ``identifier`` or ``id``, the text in ``document``, ``text``, ``text_by_page_gen`` or
    ``text_by_page_src`` (pages are joined). Only identifiers are kept in memory.

    A row belongs to the book named by its ``id``, by one part of the id between ``/``, ``:``,
    ``#`` and ``_``, or by its ``identifier`` column.

    Raises:
        ValueError: the folder holds no book.
    """

    KEYS = ("barcode_src", "identifier", "id")
    TEXTS = ("document", "text", "text_by_page_gen", "text_by_page_src")

    def __init__(self, folder: str | Path, report: Report | None = None):
        self.folder = Path(folder)
        self.places: dict[str, tuple[Path, int, int]] = {}  # file, row group, row in it
        for file in sorted(self.folder.rglob("*")):
            if file.suffix in (".txt", ".md", ".text"):
                self.places[file.stem] = (file, 0, 0)
            elif file.suffix == ".parquet":
                self._index(file, report or Report())
        if not self.places:
            raise ValueError(
                f"books: got {str(folder)!r}, which holds no book; expected <identifier>.txt files "
                f"or parquet files with a column {' or '.join(self.KEYS)}"
            )

    def _index(self, file: Path, report: Report) -> None:
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                names = parquet.schema_arrow.names
                key = next((name for name in self.KEYS if name in names), None)
                if key is None or not set(names) & set(self.TEXTS):
                    raise BadRow("no identifier or no text column", ", ".join(names))
                for group in range(parquet.num_row_groups):
                    column = parquet.read_row_group(group, columns=[key]).column(0).to_pylist()
                    self.places |= {str(k): (file, group, i) for i, k in enumerate(column)}
        except BadRow as problem:
            report.drop(problem, str(file))
        except Exception as error:  # whatever pyarrow raises on a broken file
            report.drop(BadRow("unreadable file", f"{type(error).__name__}: {error}"), str(file))

    def find(self, row: dict) -> tuple[Path, int, int] | None:
        """Where a row's book is."""
        identifier = str(row.get("id"))
        names = [row.get("identifier"), identifier, *re.split(r"[/:#]", identifier)]
        names += re.split(r"[/:#_]", identifier)
        return next((self.places[name] for name in names if name in self.places), None)

    def join(self, row: dict) -> dict:
        """The row with its document. Raises BadRow where the folder does not have it."""
        if row.get("document") is not None:
            return row
        place = self.find(row)
        if place is None:
            detail = f"{self.folder} has no book for the identifier {row.get('id')}"
            raise BadRow("document is null", detail)
        try:
            text = self._read(*place)
        except (OSError, ValueError) as error:
            raise BadRow("unreadable book", f"{place[0]}: {error}") from None
        if not text:
            raise BadRow("empty book", str(place[0]))
        return dict(row, document=text)

    def _read(self, file: Path, group: int, number: int) -> str:
        if file.suffix != ".parquet":
            return file.read_text(encoding="utf-8")
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as parquet:
            name = next(n for n in self.TEXTS if n in parquet.schema_arrow.names)
            text = parquet.read_row_group(group, columns=[name]).column(0)[number].as_py()
        return "\n".join(page or "" for page in text) if isinstance(text, list) else text


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
        response: which generator's answer becomes ``completion`` (``"Qwen3.5-27B"``); None: none.
        books: a folder to take the documents from that the dataset does not ship.
        tokenizer, min_tokens, max_tokens: length limits of the document, by this tokenizer.
        languages: only these.
        report, log: where dropped rows are counted and told; see
            :class:`~dgrpo.text.problems.Report`.

    Yields:
        The row's columns, with ``completion`` where ``response`` is given.

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
            raise BadRow(
                "document is null",
                "LongBlocks ships no text for Institutional Books; give books=FOLDER to rejoin it, "
                f"row {row['id']}",
            )
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
    from dgrpo.text.encode import count_tokens

    text = row["document"]
    if len(text.encode()) < shortest:  # a token is at least a byte
        raise BadRow("too short", f"fewer than {shortest} tokens")
    n = count_tokens(tokenizer, text)
    if n < shortest or (longest is not None and n > longest):
        raise BadRow("too short" if n < shortest else "too long", f"{n} tokens")
    row["tokens"] = n
