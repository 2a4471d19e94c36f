"""The prompts of a run: sources mixed by share, in a fixed order, from a position that resumes.

The order depends on the seed and the sources alone. All ranks walk through the same stream and each
keeps its own rows, so that neither the number of ranks nor a resumption changes what is trained on;
the price is that every rank tokenises every row, as the length filters need.
"""

import time
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from dgrpo.data.books import Books
from dgrpo.data.cursors import Pass, Shuffled
from dgrpo.data.render import Prompt, PromptEncoder
from dgrpo.data.rows import fingerprint
from dgrpo.data.survey import Survey
from dgrpo.text import BadRow, Report
from dgrpo.trainer.config import DataSource

OTHERWISE = "set another out, or read the new rows from their beginning by --allow-changes"


class PromptStream:
    """Batches of prompts from a mix of sources.

    Every position belongs to the source that is furthest behind its share, so every prefix holds
    the shares to within a row. The first source is read `epochs` times (None: for ever); the others
    repeat meanwhile, each epoch in another order.

    Args:
        tokenizer: a tokenizer of transformers; its lengths are the ones that count.
        chat, system, chat_options: see `PromptEncoder`.
        min_prompt_tokens, max_prompt_tokens, max_completion_tokens: rows outside are dropped.
        context, reserve: rows whose prompt and completion (`reserve` tokens; None: its own) are
            longer than `context` tokens together are dropped.
        require_completion: drop rows without a target (SFT, distillation on given texts).
        shuffle: off, rows come in the order of the files.
        rank, world: this process and how many share the stream.
        log, report_path: see `Report`.

    Raises:
        ValueError: no source, or a source of which no row is usable.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        tokenizer,
        *,
        seed: int = 0,
        epochs: int | None = 1,
        chat: bool | None = None,
        system: str | None = None,
        chat_options: dict | None = None,
        min_prompt_tokens: int = 0,
        max_prompt_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        context: int | None = None,
        reserve: int | None = None,
        require_completion: bool = False,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        log: Callable[[str], None] | None = None,
        report_path: str | None = None,
    ):
        if not sources:
            raise ValueError("sources: got none, expected at least one Source")
        if not 0 <= rank < world:
            raise ValueError(f"rank: got {rank}, expected 0 <= rank < world = {world}")
        self.report = Report(log if rank == 0 else lambda line: None, report_path)
        self.sources, self.rank, self.world, self.epochs = list(sources), rank, world, epochs
        self.encoder = PromptEncoder(tokenizer, chat=chat, system=system, chat_options=chat_options)
        self.lengths = (min_prompt_tokens, max_prompt_tokens, max_completion_tokens)
        self.context, self.reserve = context, reserve
        self.require_completion = require_completion
        self.cursors = [
            (Pass if source.streaming else Shuffled)(source, [seed, i], shuffle, self.report)
            for i, source in enumerate(sources)
        ]
        self.books = [Books(s.books, self.report) if s.books else None for s in sources]
        self.names = [source.name or source.path for source in sources]
        self.files = [fingerprint(source.path) for source in sources]
        self.index = 0
        self.taken = [0] * len(sources)

    @property
    def size(self) -> int | None:
        """Rows of the first source before any filter; None while streaming."""
        return self.cursors[0].size

    def batch(self, n: int) -> list[Prompt]:
        """The next `n` prompts of the global stream; of these, those that are this rank's.

        Position i belongs to rank `i % world`. Fewer at the end of the data, then none.
        """
        prompts = islice(iter(self._next, None), n)
        return [prompt for prompt in prompts if prompt.index % self.world == self.rank]

    def survey(self, seconds: float) -> list[Survey]:
        """What each source's rows are like, from random ones that can be read in some seconds.

        Rows of a streaming source are not read. The stream stands where it stood.
        """
        found = []
        for number, cursor in enumerate(self.cursors):
            part, end = Survey(cursor.size), time.monotonic() + seconds / len(self.cursors)
            for index in np.random.default_rng(0).permutation(cursor.size or 0):
                if time.monotonic() > end:
                    break
                part.add(self._prepare(number, *cursor.at(int(index)), part.report))
            found.append(part)
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
        """Go on from `state_dict`.

        Raises:
            ValueError: the sources are others, have another number of rows or other files.
        """
        if difference := self._difference(state):
            raise ValueError(f"sources: {difference}, {OTHERWISE}")
        for cursor, saved in zip(self.cursors, state["cursors"], strict=True):
            cursor.load(saved)
        self.index, self.taken = state["index"], list(state["taken"])
        self.report.load_state_dict(state["report"])

    def _difference(self, state: dict) -> str:
        """How the sources differ from those that a state is of; empty: not at all."""
        if state["names"] != self.names:
            return (
                f"got {self.names}, the saved position is of {state['names']}; "
                "resume with the sources it was saved with"
            )
        files, same = state.get("files", self.files), "resume with the same data"
        for i, (name, cursor) in enumerate(zip(self.names, self.cursors, strict=True)):
            size = state["cursors"][i].get("size")
            if size != cursor.size:
                had = f"{name!r} has {cursor.size} rows, had {size}"
                return f"{had} when the position was saved; {same}"
            if files[i] != self.files[i]:
                return f"{name!r} has other rows than when the position was saved; {same}"
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
        behind = [
            source.weight / total * (index + 1) - count
            for source, count in zip(self.sources, taken, strict=True)
        ]
        return max(range(len(behind)), key=behind.__getitem__)

    def _next(self) -> Prompt | None:
        number = self._furthest_behind(self.index, self.taken)
        cursor, epochs = self.cursors[number], self.epochs if number == 0 else None
        while epochs is None or cursor.epoch < epochs:
            found = cursor.next()
            if found is None:  # the end of an epoch
                if cursor.kept == 0:
                    raise ValueError(
                        f"sources: no usable row in {self.sources[number].path!r}; "
                        + "\n".join(self.report.lines())
                    )
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
        shortest, longest, longest_target = self.lengths
        n = len(prompt.ids)
        if n < shortest:
            raise BadRow("too short", f"{n} tokens, at least {shortest} wanted")
        if longest is not None and n > longest:
            raise BadRow("too long", f"{n} tokens, at most {longest} wanted")
        own = 0 if prompt.completion_ids is None else len(prompt.completion_ids)
        if prompt.completion_ids is None and self.require_completion:
            raise BadRow("no target", "no completion, response_* or answer column has text")
        if longest_target is not None and own > longest_target:
            raise BadRow("target too long", f"{own} tokens")
        rest = own if self.reserve is None else self.reserve
        if self.context is not None and n + rest > self.context:
            raise BadRow(
                "beyond the model's context",
                f"{n} tokens of prompt + {rest} of completion, at most {self.context} together",
            )
