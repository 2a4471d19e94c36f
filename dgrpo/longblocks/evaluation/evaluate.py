"""Score a model's completions of rows, whatever generates them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from dgrpo.data import Source, render_row
from dgrpo.longblocks.evaluation.results import Item, Results
from dgrpo.longblocks.rewards.by_row import function_of_row
from dgrpo.longblocks.rewards.worker import HOME, invoke
from dgrpo.text import BadRow, count_tokens

Generate = Callable[[list, int], Sequence[str]]
MODULES = (HOME, "dgrpo.longblocks.evaluation.scores")
MAX_TOKENS = 256


class _Entry(NamedTuple):
    """A row ready for generation."""

    where: str
    row: dict
    prompt: Any
    limit: int  # tokens of the completion
    reward: Callable


def evaluate(
    generate: Generate,
    rows: Iterable[dict],
    *,
    reward: Callable | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
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
        max_tokens: longest completion; None: the row's `max_tokens`, else 256.
        tokenizer: measures rows that do not say how long they are.
    """
    items: list[Item] = []
    lines: list[str] = []
    counts: Counter[str] = Counter()

    def fail(where: str, reason: str, detail: object) -> None:
        lines.append(f"{where}: {reason} ({str(detail)[:300]})")
        counts[reason] += 1
        if log:
            log(lines[-1])

    def entries() -> Iterator[_Entry]:
        for number, row in each(rows):
            where = f"row {number}"
            try:
                if isinstance(row, BadRow):
                    where = row.where or where
                    raise row
                where = str(row.get("id") or where)
                prompt, _ = render_row(row, Source())
                limit = int(max_tokens or row.get("max_tokens") or MAX_TOKENS)
                entry = _Entry(where, row, prompt, limit, reward or _reward(row))
            except BadRow as problem:
                fail(where, problem.reason, problem.detail)
            except (AttributeError, TypeError, ValueError) as error:
                fail(where, "malformed row", error)
            else:
                yield entry

    ready = entries()
    while batch := list(islice(ready, batch_size)):
        for limit in dict.fromkeys(entry.limit for entry in batch):
            some = [entry for entry in batch if entry.limit == limit]
            for entry, text in zip(some, _complete(generate, some), strict=True):
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


def _complete(generate: Generate, entries: list[_Entry]) -> list[str | Exception]:
    """A completion or an error per entry, all of one limit; one by one where the batch fails."""
    try:
        texts = list(generate([entry.prompt for entry in entries], entries[0].limit))
        if len(texts) != len(entries) or not all(isinstance(text, str) for text in texts):
            wanted = f"expected {len(entries)} texts"
            raise ValueError(f"generate: got {len(texts)} completions, {wanted}")
        return texts
    except Exception as error:  # out of memory, an endpoint, a prompt that is too long
        if len(entries) == 1:
            return [error]
        return [text for entry in entries for text in _complete(generate, [entry])]


def _reward(row: dict) -> Callable:
    if not row.get("reward"):
        raise BadRow("no reward", "the row has no column reward, and no other reward was given")
    try:
        return function_of_row(str(row["reward"]), homes=MODULES)
    except ValueError as error:
        raise BadRow("unknown reward", str(error)) from None


def _scored(entry: _Entry, text: str, tokenizer) -> Item:
    row, prompt = entry.row, entry.prompt
    columns = {name: [value] for name, value in row.items() if name != "reward"}
    found = invoke(entry.reward, {}, columns | {"prompts": [prompt], "completions": [text]})
    for _, message in found["errors"]:
        raise ValueError(message)
    parts = {name: values[0] for name, values in found["values"].items() if values[0] is not None}
    length = row.get("length")
    if not (isinstance(length, int) and length):
        tokens = row.get("tokens") or 0
        if tokenizer is not None and not tokens:
            tokens = count_tokens(tokenizer, str(prompt))
        length = 1 << (tokens - 1).bit_length() if tokens else 0
    return Item(
        id=entry.where,
        task=str(row.get("task") or row.get("family") or row.get("source") or "all"),
        length=length,
        score=parts.pop("reward"),
        depths=tuple(row.get("depths") or ()),
        cluster=str(row.get("document_id") or entry.where),
        chance=row.get("chance"),
        parts=parts,
        completion=text,
    )
