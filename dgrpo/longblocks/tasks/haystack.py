"""Real text to hide things in: any folder, or Python's standard library and language reference.

These differ between Python versions, so data made from them is the same only on the same version.
"""

import contextlib
import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from dgrpo.text import BadRow, Report

SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", ".git"}
LARGEST = 64 * 2**20  # bytes of one file


def text_files(folder: str | Path | None = None) -> list[Path]:
    """All files of a folder, or the standard library's sources, sorted by their relative path."""
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise ValueError(f"haystack: got {str(folder)!r}, expected a folder of text files")
    found = []
    for place, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED and not f.startswith("config-")]
        paths = (Path(place, name) for name in names if not name.startswith("."))
        found += [path for path in paths if folder or path.suffix == ".py"]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def read_text(file: Path) -> str:
    """A file's text. Raises BadRow for one that is not UTF-8 text, is empty or cannot be read."""
    try:
        if file.stat().st_size > LARGEST:
            raise BadRow("file too large", f"over {LARGEST >> 20} MiB; split it", str(file))
        text = file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRow("unreadable file", str(error), str(file)) from None
    if "\0" in text:
        raise BadRow("not text", "holds NUL bytes", str(file))
    if not text.strip():
        raise BadRow("empty file", "", str(file))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def texts(folder: str | Path | None = None, report: Report | None = None) -> Iterator[tuple]:
    """`(name, text)` of every readable file, by default of the library and its reference."""
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    for file in text_files(folder):
        try:
            yield file.relative_to(root).as_posix(), read_text(file)
        except BadRow as problem:
            if report and problem.reason != "empty file":  # there is nothing in it to lose
                report.drop(problem)
    if folder is None:
        with contextlib.suppress(ImportError):  # some distributions leave it out
            from pydoc_data.topics import topics

            yield from ((f"reference/{name}.txt", topics[name]) for name in sorted(topics))


@lru_cache(maxsize=1)
def source_lines() -> list[str]:
    """The standard library's lines of 4 to 80 printable ASCII characters, without indentation."""
    sources = (text for name, text in texts() if name.endswith(".py"))
    lines = (line.strip() for text in sources for line in text.split("\n"))
    return [s for s in lines if 4 <= len(s) <= 80 and s.isascii() and s.isprintable()]
