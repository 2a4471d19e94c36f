"""CSV and TSV files: every cell is text, an empty or absent one is null."""

import csv
import io
import sys

import numpy as np

from dgrpo.text import BadRow

DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Cells:
    """A file with a header, by row; its row offsets (16 bytes per row) are found in one pass.

    Nothing is guessed of a cell: an answer 007 stays 007, which a reader of numbers would change.

    Args:
        file: its name ends in one of `DELIMITERS`.

    Raises:
        ValueError, csv.Error: no header.
    """

    def __init__(self, file: str):
        csv.field_size_limit(sys.maxsize)  # a document is longer than the module's 128 KB
        self.name, self.delimiter = file, DELIMITERS[file[-4:]]
        self.header: list[str] = []
        starts, lines, position, line = [], [], 0, 0
        with open(file, "rb") as stream:

            def texts():
                nonlocal position, line
                for data in stream:
                    position, line = position + len(data), line + 1
                    yield data.decode("utf-8", "surrogateescape")  # reported when the row is read

            reader = csv.reader(texts(), delimiter=self.delimiter)
            while True:
                start, first = position, line + 1
                try:
                    cells = next(reader, None)
                except csv.Error:
                    if not self.header:
                        raise
                    cells = [""]  # reported when the row is read
                if cells is None:
                    break
                if cells and self.header:
                    starts.append((start, position))
                    lines.append(first)
                elif cells:
                    self.header = [cells[0].removeprefix("\ufeff"), *cells[1:]]
        if not self.header:
            raise ValueError("no header: the first line names the columns")
        self.spans = np.array(starts, np.int64).reshape(-1, 2)
        self.lines = np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict:
        start, end = map(int, self.spans[index])
        with open(self.name, "rb") as stream:
            stream.seek(start)
            data = stream.read(end - start)
        try:
            text = data.decode("utf-8")
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
        return f"{self.name}:{self.lines[index]}"
