"""Long-context tasks made here at any length, from text that `dgrpo data make` keeps for tests.

`made` has the tasks of `dgrpo data make`, `ruler` those of RULER (arXiv 2404.06654).
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np

from dgrpo.longblocks.tasks import grounding
from dgrpo.longblocks.tasks.catalog import MakeSettings, make_row
from dgrpo.longblocks.tasks.corpus import build_corpus
from dgrpo.longblocks.tasks.facts import Draft, Ground, Woven, row
from dgrpo.text import BadRow

ANSWER = 'End with a line that says "Answer: " and then '
NEEDLE = "The special number of {} is {}."


def ruler(
    tokenizer,
    tasks: Sequence[str] = (),
    lengths: Sequence[int] = (4096, 8192, 16384, 32768, 65536, 131072),
    count: int = 100,
    seed: int = 0,
    haystack: str | None = None,
) -> Iterator[dict]:
    """Rows of tasks at lengths, deterministic by seed.

    Args:
        tokenizer: measures lengths; `"bytes"`: one token per byte.
        tasks: names in `TASKS`; empty: all.
        lengths: tokens of document and question, at least 1000.
        count: rows of each task and length. The depths of a single needle go through ten equal
            parts of the document in turn.
        haystack: folder of text; None: the standard library.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"tasks: got {unknown}, expected some of {', '.join(TASKS)}")
    if not lengths or min(lengths) < 1000:
        raise ValueError(f"lengths: got {lengths}, expected at least 1000 tokens")

    def rows() -> Iterator[dict]:
        ground = Ground(build_corpus(tokenizer, haystack).part("test"), tokenizer)
        for length, task, i in product(lengths, tasks or TASKS, range(count)):
            rng = np.random.default_rng([seed, zlib.crc32(task.encode()), length, i])
            depth = (i % 10 + rng.random()) / 10
            made = TASKS[task](Draft(ground, rng, length), depth)
            made |= {"id": f"{task}-{length}-{seed}-{i}", "family": "ruler", "task": task}
            yield made | {"length": length, "max_tokens": 256}

    return rows()


def made(
    tokenizer,
    tasks: Sequence[str] = (),
    lengths: Sequence[int] = (4096,),
    count: int = 100,
    seed: int = 0,
) -> Iterator[dict | BadRow]:
    """Rows of tasks at lengths, deterministic by seed: those of the split "test".

    `tasks` are names in `dgrpo.longblocks.tasks.catalog.TASKS`, empty or "all" for all; the other
    arguments are those of `ruler`. Raises ValueError for an unknown task, or a length under 500
    tokens.
    """
    settings = MakeSettings("", tuple(tasks) or ("all",), count, tuple(lengths), split="test")
    settings = replace(settings, count=count * len(settings.named) * len(lengths), seed=seed)

    def rows() -> Iterator[dict | BadRow]:
        ground = Ground(build_corpus(tokenizer).part(settings.split), tokenizer)
        for number in range(settings.count):
            length = settings.tokens[number // len(settings.named) % len(settings.tokens)]
            try:
                yield make_row(ground, settings, number) | {"length": length}
            except Exception as error:  # whatever goes wrong costs this row alone
                yield BadRow("cannot be made", str(error))

    return rows()


def needles(draft: Draft, depth: float, *, keys=1, values=1, others: int | None = 0) -> dict:
    """Several values of a key, or several keys, among other needles (None: as many as fit well).

    A single needle lies at `depth`.
    """

    def needle(key: str = "") -> tuple[str, int]:
        return key or draft.place(), draft.number(100_000, 999_999)

    asked = [needle() for _ in range(keys)]
    asked += [needle(asked[0][0]) for _ in range(values - 1)]
    cost = draft.count(NEEDLE.format("Velmar", 123456))
    others = draft.distractors(cost) if others is None else others
    more = [needle() for _ in range(others)]
    right = [str(number) for _, number in asked]
    if len(right) == 1:
        question = f"What is the special number of {asked[0][0]}? {ANSWER}the number alone."
    else:
        question = (
            f"What are all the special numbers of {', '.join(dict(asked))} that the document "
            f"mentions? {ANSWER}the {len(right)} numbers, separated by commas."
        )
    texts = [NEEDLE.format(*pair) for pair in [*asked, *more]]
    woven = draft.weave(texts, question, [depth] if len(right) == 1 else None)
    return _row(woven, question, right, [str(n) for _, n in more], texts[: len(asked)])


def variable_tracing(draft: Draft, depth: float) -> dict:
    """All variables that hold one value, through a chain of assignments."""
    chains = []
    for _ in range(3 if draft.tokens >= 4096 else 2):
        variables = [draft.place().upper() for _ in range(5)]
        value = draft.number(10_000, 99_999)
        pairs = zip(variables[:-1], variables[1:], strict=True)
        texts = [f"VAR {variables[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairs)]
        chains.append((texts, variables, value))
    texts, variables, value = chains[0]
    question = (
        f"Which variables are assigned the value {value}, directly or through others? {ANSWER}"
        "their 5 names, separated by commas."
    )
    woven = draft.weave([text for some, _, _ in chains for text in some], question)
    wrong = [name for _, some, _ in chains[1:] for name in some]
    return _row(woven, question, variables, wrong, texts)


def word_list(draft: Draft, depth: float, *, kind: str) -> dict:
    """The most "common" or "frequent" words of a list.

    "common": a numbered list has ten words thirty times each, the others three times. "frequent":
    the three most frequent words of a text whose words follow a power law.
    """
    count, common = draft.count, kind == "common"
    top, rest = (10, 3) if common else (3, 0)
    question = (
        f"The document is a list of words. Which {top} words are the most {kind} in it? {ANSWER}"
        f"the {top} words, separated by commas."
    )
    cost = count(" velmar") + (count(" 1000.") if common else 0)
    room = (draft.tokens - count(question) - 16) // max(1, cost)
    if common:
        scale = min(1.0, room / (2 * 30 * top))  # short documents: fewer repetitions
        counts = [max(rest + 2, int(30 * scale))] * top
    else:  # zeta law: the k-th word is about k^-2 of the text, far enough apart
        shares = 1 / np.arange(1, 200) ** 2.0
        counts = [int(n) for n in np.round(room * shares / shares.sum()) if n]
    words = [draft.place().lower() for _ in counts]
    pool = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
    while rest and len(pool) + rest <= room:
        pool += [draft.place().lower()] * rest
    pool = [str(word) for word in draft.rng.permutation(pool)]

    pieces = [f"{i}. {w}" for i, w in enumerate(pool, 1)] if common else pool
    text, length = _longest(draft, pieces, draft.tokens - count("\n\n" + question) - 2)
    kept = Counter(pool[: text.count(" ") // (2 if common else 1) + 1])
    order = [word for word, _ in kept.most_common()]
    if kept[order[top - 1]] <= kept[order[top]] or set(order[:top]) != set(words[:top]):
        raise ValueError(f"lengths: {draft.tokens} tokens cannot tell the most {kind} words apart")
    woven = Woven(text, length + count(question) + 2, [], [])
    return _row(woven, question, order[:top], order[top : top + 8], [])


def _longest(draft: Draft, pieces: list[str], room: int) -> tuple[str, int]:
    """As many pieces, with spaces between, as fit into `room` tokens; the text and its tokens."""
    kept, used, block = [], 0, 256
    while block and len(kept) < len(pieces):
        text = " ".join(pieces[len(kept) : len(kept) + block])
        cost = draft.count(" " + text)
        if used + cost <= room:
            kept += pieces[len(kept) : len(kept) + block]
            used += cost
        else:
            block //= 2
    return " ".join(kept), used


def question_answering(draft: Draft, depth: float) -> dict:
    """One question over labelled passages with distractors, answered without quotes."""
    made = grounding.quoting(draft)
    right = made["aliases"][0]
    made |= dict.fromkeys(("response_reference", "privileged"), f"Answer: {right}")
    return made | {
        "question": made["question"].removesuffix(grounding.RULES) + ANSWER + "the value alone.",
        "answer": right,
        "reward": "dgrpo.rewards:exact_match",
        "passage_ids": [],
        "passages": [],
    }


def _row(woven: Woven, question: str, right: list[str], wrong: list[str], gold: list[str]) -> dict:
    one, answer = len(right) == 1, ", ".join(right)
    return row(
        woven,
        gold=gold,
        question=question,
        answer=answer,
        reward="exact_match" if one else "item_f1",
        reference=f"Answer: {answer}",
        aliases=right if one else [],
        items=[] if one else right,
        distractors=wrong,
    )


TASKS: dict[str, Callable[[Draft, float], dict]] = {
    "single_needle": needles,
    "multi_key": partial(needles, others=None),
    "multi_value": partial(needles, values=4, others=4),
    "multi_query": partial(needles, keys=4, others=4),
    "variable_tracing": variable_tracing,
    "common_words": partial(word_list, kind="common"),
    "frequent_words": partial(word_list, kind="frequent"),
    "question_answering": question_answering,
}
