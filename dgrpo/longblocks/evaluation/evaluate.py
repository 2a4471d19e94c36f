"""Score a model's completions of rows, whatever generates them."""

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from dgrpo.data import Source, render_row
from dgrpo.longblocks.evaluation.results import Item, Results
from dgrpo.longblocks.rewards.worker import invoke
from dgrpo.text import BadRow, count_tokens

Generate = Callable[[list, int], Sequence[str]]
MODULES = ("dgrpo.rewards", "dgrpo.longblocks.evaluation.scores")
MAX_TOKENS = 256


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
        rows: with the columns of `dgrpo data make`, also read lazily. `task` is what a row is
            counted under, `length` (else `tokens`, rounded up to a power of two) its length,
            `depths` where its needles lie, `document_id` what it is not independent of.
        reward: scores all rows, in place of their own; a function as in `dgrpo.rewards`.
        batch_size: prompts a call.
        max_tokens: longest completion; None: the row's `max_tokens`, else 256.
        source: how a prompt is made from a row, as in training.
        tokenizer: measures rows that do not say how long they are.
        log: receives a line for each failure.
    """
    source = source or Source()
    items: list[Item] = []
    problems: list[tuple[str, str, str]] = []

    def fail(where: str, reason: str, detail: object) -> None:
        problems.append((where, reason, str(detail)[:300]))
        if log:
            log(f"{where}: {reason} ({str(detail)[:300]})")

    for batch in _batches(rows, batch_size, fail):
        ready = []
        for number, row in batch:
            where = str(row.get("id") or f"row {number}")
            try:
                prompt, _ = render_row(row, source)
                ready.append((where, row, prompt, reward or _reward(row)))
            except BadRow as problem:
                fail(where, problem.reason, problem.detail)
            except (AttributeError, TypeError, ValueError) as error:
                fail(where, "malformed row", error)
        for (where, row, prompt, scored_by), text in _complete(generate, ready, max_tokens, fail):
            try:
                score, parts = _score(scored_by, row, prompt, text)
                items.append(_item(where, row, prompt, score, parts, text, tokenizer))
            except (Exception, SystemExit) as error:  # whatever a reward raises on an odd row
                fail(where, "reward failed", f"{type(error).__name__}: {error}")
    lines = [f"{where}: {reason} ({detail})" for where, reason, detail in problems]
    return Results(items, lines, Counter(reason for _, reason, _ in problems))


def _batches(rows: Iterable[dict], size: int, fail):
    """Lists of (number, row); rows that cannot be read are reported."""
    batch, iterator, number = [], each(rows), -1
    for number, row in iterator:
        if isinstance(row, BadRow):
            fail(row.where or f"row {number}", row.reason, row.detail)
            continue
        batch.append((number, row))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def each(rows: Iterable[dict]) -> Iterator[tuple[int, dict | BadRow]]:
    """Rows with their numbers; of a sequence also those after one that cannot be read."""
    if isinstance(rows, Sequence):  # one unreadable row does not end the others
        for number in range(len(rows)):
            try:
                yield number, rows[number]
            except BadRow as problem:
                yield number, problem
    else:
        yield from enumerate(rows)


def _complete(generate: Generate, ready: list, max_tokens: int | None, fail):
    """Pairs of an entry and its completion; entries of one limit go together."""
    limits: dict[int, list] = {}
    for entry in ready:
        limit = max_tokens or entry[1].get("max_tokens") or MAX_TOKENS
        limits.setdefault(int(limit), []).append(entry)
    for limit, entries in limits.items():
        try:
            texts = _generated(generate, entries, limit)
        except Exception as error:  # out of memory, an endpoint, a prompt that is too long
            texts = [error] if len(entries) == 1 else [_alone(generate, e, limit) for e in entries]
        for entry, text in zip(entries, texts, strict=True):
            if isinstance(text, Exception):
                fail(entry[0], "generation failed", f"{type(text).__name__}: {text}")
            else:
                yield entry, text


def _alone(generate: Generate, entry: tuple, limit: int) -> str | Exception:
    try:
        return _generated(generate, [entry], limit)[0]
    except Exception as error:
        return error


def _generated(generate: Generate, entries: list, limit: int) -> list[str]:
    texts = list(generate([prompt for _, _, prompt, _ in entries], limit))
    if len(texts) != len(entries) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"generate: got {len(texts)} completions, expected {len(entries)} texts")
    return texts


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


def _score(reward: Callable, row: dict, prompt, text: str) -> tuple[float, dict]:
    columns = {name: [value] for name, value in row.items() if name != "reward"}
    found = invoke(
        reward, {}, {"prompts": [prompt], "completions": [text], "columns": columns}, None
    )
    for _, message in found["errors"]:
        raise ValueError(message)
    values = {name: values[0] for name, values in found["values"].items()}
    score = values.pop("reward")
    return score, {name: v for name, v in values.items() if v is not None}


def _item(where, row, prompt, score, parts, text, tokenizer) -> Item:
    length = row.get("length") if isinstance(row.get("length"), int) else 0
    tokens = 0 if length else row.get("tokens") or 0
    if tokenizer is not None and not (length or tokens):
        tokens = count_tokens(tokenizer, prompt if isinstance(prompt, str) else str(prompt))
    return Item(
        id=where,
        task=str(row.get("task") or row.get("family") or row.get("source") or "all"),
        length=length or (1 << (tokens - 1).bit_length() if tokens else 0),
        score=score,
        depths=tuple(row.get("depths") or ()),
        cluster=str(row.get("document_id") or where),
        chance=row.get("chance"),
        parts=parts,
        completion=text,
    )
