"""Score a model's completions of rows, whatever generates them."""

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from dgrpo.data import Source, render_row
from dgrpo.longblocks.evaluation.results import Item, Results
from dgrpo.longblocks.rewards.worker import invoke
from dgrpo.text import BadRow, count_tokens

Generate = Callable[[list, int], Sequence[str]]
MODULES = ("dgrpo.rewards", "dgrpo.longblocks.evaluation.scores")
MAX_TOKENS = 256


class _Entry(NamedTuple):
    """A row ready for generation."""

    where: str
    row: dict
    prompt: Any
    reward: Callable


def evaluate(
    generate: Generate,
    rows: Iterable[dict],
    *,
    reward: Callable | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    source: Source | None = None,
    tokenizer=None,
    log: Callable[[str], None] | None = None,
) -> Results:
    """Generate a completion for every row and score it by a reward, else by the one that it names.

    A row that cannot be rendered, generated or scored is reported, counted and left out; where a
    batch fails, its rows are tried one by one.

    Args:
        generate: `(prompts, max_tokens) -> completions`; a prompt is a text or chat messages.
        rows: with the columns of `dgrpo data make`, also read lazily. A row is counted under its
            `task` and `length` (else `tokens`, rounded up to a power of two); `depths` say where
            its needles lie, and rows of one `document_id` are not independent.
        reward: scores all rows, in place of their own; a function as in `dgrpo.rewards`.
        batch_size: prompts per call.
        max_tokens: longest completion; None: the row's `max_tokens`, else 256.
        source: how a prompt is made from a row, as in training.
        tokenizer: measures rows that do not say how long they are.
        log: receives a line for each failure.
    """
    source = source or Source()
    items: list[Item] = []
    lines: list[str] = []
    counts: Counter[str] = Counter()

    def fail(where: str, reason: str, detail: object) -> None:
        lines.append(f"{where}: {reason} ({str(detail)[:300]})")
        counts[reason] += 1
        if log:
            log(lines[-1])

    def readable() -> Iterator[tuple[int, dict]]:
        for number, row in each(rows):
            if isinstance(row, BadRow):
                fail(row.where or f"row {number}", row.reason, row.detail)
            else:
                yield number, row

    numbered = readable()
    while batch := list(islice(numbered, batch_size)):
        limits: dict[int, list[_Entry]] = {}  # entries of one limit go together
        for number, row in batch:
            where = str(row.get("id") or f"row {number}")
            try:
                prompt, _ = render_row(row, source)
                limit = int(max_tokens or row.get("max_tokens") or MAX_TOKENS)
                entry = _Entry(where, row, prompt, reward or _reward(row))
                limits.setdefault(limit, []).append(entry)
            except BadRow as problem:
                fail(where, problem.reason, problem.detail)
            except (AttributeError, TypeError, ValueError) as error:
                fail(where, "malformed row", error)
        for limit, entries in limits.items():
            for entry, text in zip(entries, _complete(generate, entries, limit), strict=True):
                if isinstance(text, Exception):
                    fail(entry.where, "generation failed", f"{type(text).__name__}: {text}")
                    continue
                try:
                    items.append(_scored(entry, text, tokenizer))
                except (Exception, SystemExit) as error:  # whatever a reward raises on an odd row
                    fail(entry.where, "reward failed", f"{type(error).__name__}: {error}")
    return Results(items, lines, dict(counts))


def each(rows: Iterable[dict]) -> Iterator[tuple[int, dict | BadRow]]:
    """Rows with their numbers; of a sequence also those after one that cannot be read."""
    if not isinstance(rows, Sequence):
        yield from enumerate(rows)
        return
    for number in range(len(rows)):
        try:
            yield number, rows[number]
        except BadRow as problem:
            yield number, problem


def _complete(generate: Generate, entries: list[_Entry], limit: int) -> list[str | Exception]:
    """A completion or an error per entry; where the batch fails, one by one."""
    try:
        texts = list(generate([entry.prompt for entry in entries], limit))
        if len(texts) != len(entries) or not all(isinstance(text, str) for text in texts):
            wanted = f"expected {len(entries)} texts"
            raise ValueError(f"generate: got {len(texts)} completions, {wanted}")
        return texts
    except Exception as error:  # out of memory, an endpoint, a prompt that is too long
        if len(entries) == 1:
            return [error]
        return [text for entry in entries for text in _complete(generate, [entry], limit)]


def _reward(row: dict) -> Callable:
    path = row.get("reward")
    if not path:
        raise BadRow("no reward", "the row has no column reward, and no other reward was given")
    module, _, name = str(path).rpartition(":")
    module = module or MODULES[0]
    found = getattr(importlib.import_module(module), name, None) if module in MODULES else None
    if not callable(found):
        raise BadRow("unknown reward", f"{path!r}; expected a function of {' or '.join(MODULES)}")
    return found


def _scored(entry: _Entry, text: str, tokenizer) -> Item:
    where, row, prompt, reward = entry
    columns = {name: [value] for name, value in row.items() if name != "reward"}
    found = invoke(reward, {}, columns | {"prompts": [prompt], "completions": [text]})
    for _, message in found["errors"]:
        raise ValueError(message)
    parts = {name: values[0] for name, values in found["values"].items() if values[0] is not None}
    length = row.get("length") if isinstance(row.get("length"), int) else 0
    tokens = 0 if length else row.get("tokens") or 0
    if tokenizer is not None and not (length or tokens):
        tokens = count_tokens(tokenizer, prompt if isinstance(prompt, str) else str(prompt))
    return Item(
        id=where,
        task=str(row.get("task") or row.get("family") or row.get("source") or "all"),
        length=length or (1 << (tokens - 1).bit_length() if tokens else 0),
        score=parts.pop("reward"),
        depths=tuple(row.get("depths") or ()),
        cluster=str(row.get("document_id") or where),
        chance=row.get("chance"),
        parts=parts,
        completion=text,
    )
