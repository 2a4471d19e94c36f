"""Book texts that a data set may not ship, joined again from a folder of the user's."""

import re
from pathlib import Path

from dgrpo.data.tables import unreadable
from dgrpo.text import BadRow, Report


def no_document(row: dict) -> BadRow:
    """The problem of a row whose text its data set may not ship."""
    hint = "the public LongBlocks has no text for Institutional Books; give books=FOLDER to rejoin"
    return BadRow("document is null", f"{hint} it, row {row.get('id')}")


class Books:
    """Texts by identifier, from a folder of the user's.

    Text files are named by identifier. Parquet files hold one book per row, as Institutional Books
    is published: the identifier in one of the columns `KEYS`, the text in one of `TEXTS` (pages are
    joined). A row belongs to the book named by its `identifier`, its `id`, or a part of the id
    between `/`, `:`, `#` and `_`.
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
            wanted = f"<identifier>.txt or parquet files with a column {' or '.join(self.KEYS)}"
            raise ValueError(f"books: got {str(folder)!r}, which holds no book; expected {wanted}")

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
            report.drop(unreadable(file, error))

    def join(self, row: dict) -> dict:
        """The row with its document. Raises BadRow where the folder does not have it."""
        if row.get("document") is not None:
            return row
        identifier = str(row.get("id"))
        names = [row.get("identifier"), identifier, *re.split(r"[/:#]", identifier)]
        names += re.split(r"[/:#_]", identifier)
        place = next((self.places[name] for name in names if name in self.places), None)
        if place is None:
            raise BadRow("document is null", f"{self.folder} has no book for {identifier}")
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
