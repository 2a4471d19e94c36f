"""The prompts of a run: sources mixed by share, in a fixed order, from a position that resumes.

The order depends on the seed and the sources alone. All ranks walk through the same global stream
and each keeps its own rows, so that neither the number of ranks nor a resumption changes what is
trained on; the price is that every rank tokenises every row, as the length filters need.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dgrpo.data.longblocks import Books
from dgrpo.data.passes import RowStream
from dgrpo.data.problems import BadRow, Report
from dgrpo.data.render import Prompt, PromptEncoder, Source
from dgrpo.data.rows import load_rows

BLOCK = 256  # rows shuffled together while streaming


class PromptStream:
    """Batches of prompts from a mix of sources.

    Position i of the stream belongs to the source that is furthest behind its share, so every
    prefix holds the shares to within a row. The stream ends when the first source has been read
    ``epochs`` times; the others repeat, each epoch in another order.

    Args:
        sources: what to mix.
        tokenizer: a tokenizer of transformers; its lengths are the ones that count.
        seed: of the order.
        epochs: passes over the first source; None never ends.
        chat, system, chat_options: see :class:`~dgrpo.data.render.PromptEncoder`.
        min_prompt_tokens, max_prompt_tokens, max_completion_tokens: rows outside are dropped.
        require_completion: drop rows without a target (SFT, distillation on given texts).
        shuffle: off, rows come in the order of the files.
        rank, world: this process and how many share the stream.
        log, report_path: see :class:`~dgrpo.data.problems.Report`.

    Raises:
        ValueError: no source, a weight that is not positive, or a source of which no row is usable.
    """

    def __init__(
        self,
        sources: Sequence[Source],
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
        require_completion: bool = False,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        log: Callable[[str], None] | None = None,
        report_path: str | None = None,
    ):
        if not sources:
            raise ValueError("sources: got none, expected at least one Source")
        for source in sources:
            if not source.weight > 0:
                raise ValueError(f"weight: got {source.weight} for {source.path!r}, expected > 0")
        if not 0 <= rank < world:
            raise ValueError(f"rank: got {rank}, expected 0 <= rank < world = {world}")
        self.report = Report(log if rank == 0 else lambda line: None, report_path)
        self.sources, self.rank, self.world, self.epochs = list(sources), rank, world, epochs
        self.encoder = PromptEncoder(tokenizer, chat=chat, system=system, chat_options=chat_options)
        self.lengths = (min_prompt_tokens, max_prompt_tokens, max_completion_tokens)
        self.require_completion = require_completion
        self.cursors = [
            (_Pass if source.streaming else _Shuffled)(source, [seed, i], shuffle, self.report)
            for i, source in enumerate(sources)
        ]
        self.books = [Books(s.books, self.report) if s.books else None for s in sources]
        self.index = 0
        self.taken = [0] * len(sources)

    @property
    def size(self) -> int | None:
        """Rows of the first source before any filter; None while streaming."""
        return self.cursors[0].size

    def batch(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts of the global stream; of these, those that are this rank's.

        Position i belongs to rank ``i % world``. Fewer at the end of the data, then none.
        """
        prompts = []
        for _ in range(n):
            prompt = self._next()
            if prompt is None:
                break
            if prompt.index % self.world == self.rank:
                prompts.append(prompt)
        return prompts

    def state_dict(self) -> dict:
        """Where the stream stands, JSON-able, valid on any number of ranks."""
        return {
            "index": self.index,
            "taken": list(self.taken),
            "cursors": [cursor.state() for cursor in self.cursors],
            "names": [source.name or source.path for source in self.sources],
            "report": self.report.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: the sources are others, or have another number of rows.
        """
        names = [source.name or source.path for source in self.sources]
        if state["names"] != names:
            raise ValueError(
                f"sources: got {names}, the saved position is of {state['names']}; "
                "resume with the sources it was saved with"
            )
        for cursor, saved in zip(self.cursors, state["cursors"], strict=True):
            cursor.load(saved)
        self.index, self.taken = state["index"], list(state["taken"])
        self.report.load_state_dict(state["report"])

    def _next(self) -> Prompt | None:
        total = sum(source.weight for source in self.sources)
        behind = [
            source.weight / total * (self.index + 1) - taken
            for source, taken in zip(self.sources, self.taken, strict=True)
        ]
        number = max(range(len(behind)), key=behind.__getitem__)
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
            prompt = self._prepare(number, *found)
            if prompt is not None:
                cursor.kept += 1
                self.report.kept += 1
                prompt.index, self.index = self.index, self.index + 1
                self.taken[number] += 1
                return prompt
        return None

    def _prepare(self, number: int, where: str, row: dict | BadRow) -> Prompt | None:
        source, books = self.sources[number], self.books[number]
        try:
            if isinstance(row, BadRow):
                raise row
            if any(row.get(column) != value for column, value in source.where.items()):
                return None
            prompt = self.encoder.encode(books.join(row) if books else row, source, where)
            self._check(prompt)
        except BadRow as problem:
            self.report.drop(problem, where)
            return None
        except Exception as error:  # an unexpected shape, a template or a tokenizer that objects
            self.report.drop(BadRow("malformed row", f"{type(error).__name__}: {error}"), where)
            return None
        return prompt

    def _check(self, prompt: Prompt) -> None:
        shortest, longest, longest_target = self.lengths
        n = len(prompt.ids)
        if n < shortest:
            raise BadRow("too short", f"{n} tokens, at least {shortest} wanted")
        if longest is not None and n > longest:
            raise BadRow("too long", f"{n} tokens, at most {longest} wanted")
        if prompt.completion_ids is None:
            if self.require_completion:
                raise BadRow("no target", "no completion, response_* or answer column has text")
        elif longest_target is not None and len(prompt.completion_ids) > longest_target:
            raise BadRow("target too long", f"{len(prompt.completion_ids)} tokens")


class _Shuffled:
    """Random access: every epoch another permutation of all rows."""

    def __init__(self, source: Source, seed: list[int], shuffle: bool, report: Report):
        if source.rows is not None:
            self.rows: Sequence[dict] = source.rows
        else:
            self.rows = load_rows(
                source.path,
                split=source.split,
                columns=source.columns,
                options=source.options,
                report=report,
            )
        self.seed, self.shuffle, self.size = seed, shuffle, len(self.rows)
        self.name = source.name or source.path or "rows"
        self.kept = 0
        self._start(0, 0)

    def _start(self, epoch: int, offset: int) -> None:
        self.epoch, self.offset = epoch, offset
        order = (
            np.random.default_rng([*self.seed, epoch]).permutation if self.shuffle else np.arange
        )
        self.order = order(self.size)

    def next(self) -> tuple[str, dict | BadRow] | None:
        """The next row and its place; None at the end of an epoch."""
        if self.offset >= self.size:
            self._start(self.epoch + 1, 0)
            return None
        index = int(self.order[self.offset])
        self.offset += 1
        where = self.rows.where(index) if hasattr(self.rows, "where") else f"{self.name}:{index}"
        try:
            return where, self.rows[index]
        except BadRow as problem:
            return where, problem
        except Exception as error:  # whatever a reader of the user's raises
            return where, BadRow("unreadable row", f"{type(error).__name__}: {error}")

    def state(self) -> dict:
        return {"epoch": self.epoch, "offset": self.offset, "size": self.size, "kept": self.kept}

    def load(self, state: dict) -> None:
        if state["size"] != self.size:
            raise ValueError(
                f"sources: {self.name!r} has {self.size} rows, had {state['size']} when the "
                "position was saved; resume with the same data"
            )
        self._start(state["epoch"], state["offset"])
        self.kept = state["kept"]


class _Pass:
    """Streaming: blocks of rows in file order, shuffled within a block."""

    size = None

    def __init__(self, source: Source, seed: list[int], shuffle: bool, report: Report):
        self.source, self.seed, self.shuffle, self.report = source, seed, shuffle, report
        self.name, self.kept = source.name or source.path, 0
        self._start(0, None)

    def _start(self, epoch: int, state: dict | None) -> None:
        self.epoch, self.blocks, self.offset = epoch, 0, 0
        self.stream = RowStream(
            self.source.path,
            split=self.source.split,
            columns=self.source.columns,
            report=self.report,
            seed=sum(s * 1_000_003**i for i, s in enumerate(self.seed)) % 2**31,
            epoch=epoch,
            state=state,
        )
        self.iterator = iter(self.stream)
        self.before = self.stream.state()
        self.block: list = []

    def _fill(self) -> None:
        self.before, self.offset = self.stream.state(), 0
        rows = [row for _, row in zip(range(BLOCK), self.iterator, strict=False)]
        order = np.random.default_rng([*self.seed, self.epoch, self.blocks]).permutation(len(rows))
        self.block = [rows[i] for i in order] if self.shuffle else rows
        self.blocks += 1

    def next(self) -> tuple[str, dict | BadRow] | None:
        if self.offset >= len(self.block):
            self._fill()
            if not self.block:
                self._start(self.epoch + 1, None)
                return None
        self.offset += 1
        return self.block[self.offset - 1]

    def state(self) -> dict:
        counts = {"epoch": self.epoch, "block": self.blocks, "offset": self.offset}
        return counts | {"stream": self.before, "kept": self.kept}

    def load(self, state: dict) -> None:
        self._start(state["epoch"], state["stream"])
        if state["block"]:
            self.blocks = state["block"] - 1
            self._fill()
        self.offset, self.kept = state["offset"], state["kept"]
