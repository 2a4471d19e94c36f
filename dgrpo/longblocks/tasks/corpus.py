"""A haystack tokenised once: text cut into short units, each with its number of tokens.

A document of any length is a run of consecutive units, chosen by adding up token counts, so that
nothing is tokenised again. The text lies in one file that processes map into memory.
"""

import json
import mmap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from dgrpo.longblocks.tasks.haystack import texts
from dgrpo.text import Report, count_tokens

UNIT = 120  # least characters of a unit, about 32 tokens: the grain of needle positions
LIMIT = 64 * 2**20  # bytes of text after which no further file is read
SPLITS = ("train", "test")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Units of text with cumulative token counts."""

    blob: bytes | mmap.mmap
    starts: np.ndarray  # (units + 1,) int64, byte positions of the units in the blob
    totals: np.ndarray  # (units + 1,) int64, tokens before each unit
    files: list[tuple[str, int, int]]  # name, first unit, the unit after the last
    border: int  # units of the training split; the test split is the rest

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """Tokens of the whole text."""
        return int(self.totals[-1])

    @property
    def code(self) -> list[tuple[str, int, int]]:
        """Those of `files` that are Python."""
        return [file for file in self.files if file[0].endswith(".py")]

    def part(self, split: str) -> "Corpus":
        """The units of a split."""
        low, high = (0, self.border) if split == "train" else (self.border, len(self))
        if high - low < 1:
            raise ValueError(f"haystack: got {len(self)} units of text, too few for {split!r}")
        totals = self.totals[low : high + 1] - self.totals[low]
        files = [(n, a - low, b - low) for n, a, b in self.files if low <= a and b <= high]
        return Corpus(self.blob, self.starts[low : high + 1], totals, files, high - low)

    def text(self, first: int, last: int) -> str:
        """Units first to last - 1; numbers past the end start again at the beginning."""
        n, pieces = len(self), []
        while first < last:
            start, take = first % n, min(last - first, n - first % n)
            pieces.append(self.blob[self.starts[start] : self.starts[start + take]])
            first += take
        return b"".join(pieces).decode("utf-8")

    def before(self, unit: int) -> int:
        """Tokens before a unit; numbers past the end count the text again."""
        return self.tokens * (unit // len(self)) + int(self.totals[unit % len(self)])

    def reach(self, first: int, room: int) -> int:
        """The unit after the longest run from `first` on of at most `room` tokens."""
        goal = self.before(first) + room
        rounds, rest = divmod(goal, self.tokens)
        return rounds * len(self) + int(np.searchsorted(self.totals, rest, side="right")) - 1

    def save(self, folder: Path) -> None:
        """Write to a folder, for `load`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.bin").write_bytes(self.blob)
        np.save(folder / "starts.npy", self.starts)
        np.save(folder / "totals.npy", self.totals)
        (folder / "files.json").write_text(json.dumps([self.border, self.files]))

    @classmethod
    def load(cls, folder: Path) -> "Corpus":
        """The corpus of `save`, its text mapped into memory."""
        with (folder / "text.bin").open("rb") as file:
            blob = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        border, files = json.loads((folder / "files.json").read_text())
        starts, totals = np.load(folder / "starts.npy"), np.load(folder / "totals.npy")
        return cls(blob, starts, totals, [tuple(file) for file in files], border)


def build_corpus(
    tokenizer, folder: str | Path | None = None, *, report: Report | None = None
) -> Corpus:
    """Tokenise the texts of a folder (None: the standard library), up to `LIMIT` bytes.

    `report` counts the files that cannot be read. Raises ValueError where none can.
    """
    found, size = [], 0
    for name, text in texts(folder, report):
        found.append((name, text.rstrip() + "\n\n"))
        size += len(text)
        if size >= LIMIT:
            break
    if not found:
        raise ValueError(f"haystack: got {str(folder)!r}, which holds no readable text")
    held_out = found[9::10]  # every tenth file is for tests, the last in order
    del found[9::10]
    blob, starts, totals, files, border = bytearray(), [0], [0], [], 0
    for number, (name, text) in enumerate([*found, *held_out]):
        cuts, first = unit_cuts(text), len(starts) - 1
        totals += unit_tokens(tokenizer, text, cuts)
        for begin, end in pairwise(cuts):
            blob += text[begin:end].encode("utf-8", errors="replace")
            starts.append(len(blob))
        files.append((name, first, len(starts) - 1))
        border = len(starts) - 1 if number < len(found) else border
    if not held_out:  # fewer than ten files: the last tenth of the text
        border = max(1, border * 9 // 10)
    return Corpus(
        bytes(blob), np.array(starts, np.int64), np.cumsum(totals, dtype=np.int64), files, border
    )


def unit_cuts(text: str) -> list[int]:
    """Cut a text at line ends, very long lines at spaces, into units of at least `UNIT`."""
    cuts, position, most = [0], 0, 16 * UNIT
    while position < len(text):
        end = text.find("\n", position + UNIT - 1) + 1 or len(text)
        if end - position > most:
            space = text.rfind(" ", position + UNIT, position + most)
            end = space if space > 0 else position + most
        while end < len(text) and text[end] == "\n":  # blank lines stay with what they follow
            end += 1
        position = end
        cuts.append(position)
    return cuts


def unit_tokens(tokenizer, text: str, cuts: list[int]) -> list[int]:
    """Tokens of every unit, as they fall when the text is tokenised as a whole."""
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [count_tokens(tokenizer, piece) for piece in pieces]
    backend.no_truncation()
    backend.no_padding()
    counts = np.zeros(len(pieces), np.int64)
    for low in range(0, len(pieces), 4096):  # bounds the memory of a very long file
        high = min(low + 4096, len(pieces))
        encoding = backend.encode(text[cuts[low] : cuts[high]], add_special_tokens=False)
        ends = np.array([end for _, end in encoding.offsets], np.int64) + cuts[low]
        units = np.searchsorted(cuts, ends, side="left") - 1
        counts += np.bincount(np.clip(units, 0, None), minlength=len(pieces))
    return counts.tolist()
