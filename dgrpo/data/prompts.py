"""The prompts of a run: sources mixed by share, in a fixed order, from a position that resumes.

All ranks walk through the same stream, tokenising every row as the length filters need, and keep
their own rows: neither the number of ranks nor a resumption changes what is trained on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from dgrpo.data.books import Books
from dgrpo.data.render import Prompt, PromptEncoder
from dgrpo.data.row_stream import Pass, Shuffled
from dgrpo.data.rows import fingerprint
from dgrpo.text import BadRow, Report
from dgrpo.trainer.config import Data

OTHERWISE = "set another out, or read the new rows from their beginning by --allow-changes"


@dataclass
class Survey:
    """What reading some rows of a source gave."""

    size: int | None  # rows of the source; None while streaming
    looked: int = 0  # rows that were read
    kept: int = 0  # those of them that are usable
    report: Report = field(default_factory=lambda: Report(lambda line: None))  # on the others
    prompt_tokens: int = 0  # of the usable rows
    completion_tokens: int = 0

    @property
    def whole(self) -> bool:
        """Whether all rows were read."""
        return self.looked == self.size

    @property
    def usable(self) -> int | None:
        """Usable rows of the source: counted, or estimated; None: not known."""
        return round(self.size * self.kept / self.looked) if self.looked else None

    def add(self, prompt: Prompt | None) -> None:
        """Count a row; None is one that is not usable."""
        self.looked += 1
        if prompt is not None:
            self.kept += 1
            self.prompt_tokens += len(prompt.ids)
            if prompt.completion_ids is not None:
                self.completion_tokens += len(prompt.completion_ids)


class PromptStream:
    """Batches of prompts from a mix of sources.

    Every position belongs to the source that is furthest behind its share, so every prefix holds
    the shares to within a row. The first source is read `epochs` times (None: for ever); the others
    repeat meanwhile, each epoch in another order.

    Args:
        tokenizer: a tokenizer of transformers; its lengths are the ones that count.
        context, reserve: rows whose prompt and completion (`reserve` tokens; None: its own) are
            longer than `context` tokens together are dropped.
        require_completion: drop rows without a target (SFT, distillation on given texts).
        rank, world: this process and how many share the stream.
        log: see `Report`.

    Raises:
        ValueError: no source, or a source of which no row is usable.
    """

    def __init__(
        self,
        data: Data,
        tokenizer,
        *,
        seed: int = 0,
        epochs: int | None = 1,
        context: int | None = None,
        reserve: int | None = None,
        require_completion: bool = False,
        rank: int = 0,
        world: int = 1,
        log: Callable[[str], None] | None = None,
    ):
        sources = data.sources
        if not sources:
            raise ValueError("sources: got none, expected at least one Source")
        if not 0 <= rank < world:
            raise ValueError(f"rank: got {rank}, expected 0 <= rank < world = {world}")
        self.report = Report(log if rank == 0 else lambda line: None)
        self.data, self.sources, self.epochs = data, sources, epochs
        self.rank, self.world = rank, world
        self.encoder = PromptEncoder(
            tokenizer, chat=data.chat, system=data.system, chat_options=data.chat_options
        )
        self.context, self.reserve = context, reserve
        self.require_completion = require_completion
        self.cursors = [
            (Pass if source.streaming else Shuffled)(source, [seed, i], data.shuffle, self.report)
            for i, source in enumerate(sources)
        ]
        self.books = [Books(s.books, self.report) if s.books else None for s in sources]
        self.names = [source.name or source.path for source in sources]
        self.files = [fingerprint(source.path) for source in sources]
        self.index = 0
        self.taken = [0] * len(sources)

    def batch(self, n: int) -> list[Prompt]:
        """This rank's (`index % world`) of the next `n` prompts; fewer, then none, at the end."""
        prompts = islice(iter(self._next, None), n)
        return [prompt for prompt in prompts if prompt.index % self.world == self.rank]

    def survey(self, seconds: float) -> list[Survey]:
        """Read random rows of the sources that are not streamed; the stream stays where it is."""
        found = [Survey(cursor.size) for cursor in self.cursors]
        for number, (part, cursor) in enumerate(zip(found, self.cursors, strict=True)):
            end = time.monotonic() + seconds / len(found)
            for index in np.random.default_rng(0).permutation(cursor.size or 0):
                if time.monotonic() > end:
                    break
                part.add(self._prepare(number, *cursor.at(int(index)), part.report))
        return found

    def state_dict(self) -> dict:
        """Where the stream stands, JSON-able, valid on any number of ranks."""
        return {
            "index": self.index,
            "taken": list(self.taken),
            "cursors": [cursor.state() for cursor in self.cursors],
            "names": self.names,
            "files": self.files,
            "report": self.report.state_dict(),
        }

    def fits(self, state: dict) -> bool:
        """Whether `state_dict` gave `state` for the same sources with the same rows."""
        return not self._difference(state)

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`. Raises ValueError where the sources or their rows are others."""
        if difference := self._difference(state):
            raise ValueError(f"sources: {difference}, {OTHERWISE}")
        for cursor, saved in zip(self.cursors, state["cursors"], strict=True):
            cursor.load(saved)
        self.index, self.taken = state["index"], list(state["taken"])
        self.report.load_state_dict(state["report"])

    def _difference(self, state: dict) -> str:
        """How the sources differ from those that a state is of; empty: not at all."""
        if state["names"] != self.names:
            saved = f"the saved position is of {state['names']}"
            return f"got {self.names}, {saved}; resume with the sources it was saved with"
        for i, (name, cursor) in enumerate(zip(self.names, self.cursors, strict=True)):
            size, has = state["cursors"][i].get("size"), ""
            if size != cursor.size:
                has = f"{cursor.size} rows, had {size}"
            elif state["files"][i] != self.files[i]:
                has = "other rows than"
            if has:
                return f"{name!r} has {has} when the position was saved; resume with the same data"
        return ""

    def length(self, rows: int) -> int:
        """Prompts from the beginning to the end, where the first source has `rows` in all."""
        if len(self.sources) == 1:
            return rows
        index, taken = 0, [0] * len(self.sources)
        while (number := self._furthest_behind(index, taken)) or taken[0] < rows:
            index, taken[number] = index + 1, taken[number] + 1
        return index

    def _furthest_behind(self, index: int, taken: Sequence[int]) -> int:
        """The source of position `index`: the one that is furthest behind its share."""
        total = sum(source.weight for source in self.sources)
        shares = [source.weight / total for source in self.sources]
        return max(range(len(shares)), key=lambda i: shares[i] * (index + 1) - taken[i])

    def _next(self) -> Prompt | None:
        number = self._furthest_behind(self.index, self.taken)
        cursor, epochs = self.cursors[number], self.epochs if number == 0 else None
        while epochs is None or cursor.epoch < epochs:
            found = cursor.next()
            if found is None:  # the end of an epoch
                if cursor.kept == 0:
                    path, told = self.sources[number].path, "\n".join(self.report.lines())
                    raise ValueError(f"sources: no usable row in {path!r}; {told}")
                cursor.kept = 0
                continue
            prompt = self._prepare(number, *found, self.report)
            if prompt is not None:
                cursor.kept += 1
                self.report.kept += 1
                prompt.index, self.index = self.index, self.index + 1
                self.taken[number] += 1
                return prompt
        return None

    def _prepare(self, number: int, where: str, row, report: Report) -> Prompt | None:
        source, books = self.sources[number], self.books[number]
        try:
            if isinstance(row, BadRow):
                raise row
            if any(row.get(column) != value for column, value in source.where.items()):
                return None
            prompt = self.encoder.encode(books.join(row) if books else row, source, where)
            self._check(prompt)
        except BadRow as problem:
            report.drop(problem, where)
            return None
        except Exception as error:  # an unexpected shape, a template or a tokenizer that objects
            report.drop(BadRow("malformed row", f"{type(error).__name__}: {error}"), where)
            return None
        return prompt

    def _check(self, prompt: Prompt) -> None:
        data, n = self.data, len(prompt.ids)
        longest, longest_target = data.max_prompt_tokens, data.max_completion_tokens
        if n < data.min_prompt_tokens:
            raise BadRow("too short", f"{n} tokens, at least {data.min_prompt_tokens} wanted")
        if longest is not None and n > longest:
            raise BadRow("too long", f"{n} tokens, at most {longest} wanted")
        own = 0 if prompt.completion_ids is None else len(prompt.completion_ids)
        if prompt.completion_ids is None and self.require_completion:
            raise BadRow("no target", "no completion, response_* or answer column has text")
        if longest_target is not None and own > longest_target:
            raise BadRow("target too long", f"{own} tokens")
        rest = own if self.reserve is None else self.reserve
        if self.context is not None and n + rest > self.context:
            both = f"{n} tokens of prompt + {rest} of completion"
            raise BadRow("beyond the model's context", f"{both}, at most {self.context} together")
