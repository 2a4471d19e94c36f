"""Long-context tasks in the manner of RULER (arXiv 2404.06654), made here at any length.

Needles in real text (one; among many keys; several values of a key; several keys asked), variable
tracing, the most common and the most frequent words of a list, and questions over passages with
distractors. Documents come from text that `dgrpo data make` keeps for tests.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import numpy as np

from dgrpo.longblocks.tasks import grounding
from dgrpo.longblocks.tasks.corpus import build_corpus
from dgrpo.longblocks.tasks.facts import Draft, Ground, Woven, row

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
        lengths: tokens of document and question.
        count: rows of each task and length. The depths of a single needle go through ten equal
            parts of the document in turn.
        seed: of everything.
        haystack: folder of text; None: the standard library.

    Raises:
        ValueError: an unknown task, or a length under 1000 tokens.
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
            made = TASKS[task](ground, rng, length, depth)
            made |= {"id": f"{task}-{length}-{seed}-{i}", "family": "ruler", "task": task}
            yield made | {"length": length, "max_tokens": 256}

    return rows()


def needles(
    ground: Ground, rng, tokens: int, depth: float, *, keys=1, values=1, others: int | None = 0
) -> dict:
    """Several values of a key, or several keys, among other needles (None: as many as fit well).

    A single needle lies at `depth`.
    """
    names = Draft(ground, rng, tokens)
    depths = [depth] if keys == values == 1 else None
    asked = [(names.place(), names.number(100_000, 999_999)) for _ in range(keys)]
    asked += [(asked[0][0], names.number(100_000, 999_999)) for _ in range(values - 1)]
    cost = ground.count(NEEDLE.format("Velmar", 123456))
    others = names.distractors(cost) if others is None else others
    more = [(names.place(), names.number(100_000, 999_999)) for _ in range(others)]
    keys_asked = list(dict.fromkeys(key for key, _ in asked))
    right = [str(number) for _, number in asked]
    if len(right) == 1:
        question = f"What is the special number of {asked[0][0]}? {ANSWER}the number alone."
    else:
        question = (
            f"What are all the special numbers of {', '.join(keys_asked)} that the document "
            f"mentions? {ANSWER}the {len(right)} numbers, separated by commas."
        )
    texts = [NEEDLE.format(*pair) for pair in [*asked, *more]]
    woven = names.weave(texts, question, depths)
    wrong = [str(number) for _, number in more]
    return _row(woven, question, right, wrong, texts[: len(asked)])


def variable_tracing(ground: Ground, rng, tokens: int, depth: float) -> dict:
    """All variables that hold one value, through a chain of assignments."""
    names = Draft(ground, rng, tokens)
    chains = []
    for _ in range(3 if tokens >= 4096 else 2):
        variables = [names.place().upper() for _ in range(5)]
        value = names.number(10_000, 99_999)
        pairs = zip(variables[:-1], variables[1:], strict=True)
        texts = [f"VAR {variables[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairs)]
        chains.append((texts, variables, value))
    texts, variables, value = chains[0]
    question = (
        f"Which variables are assigned the value {value}, directly or through others? {ANSWER}"
        "their 5 names, separated by commas."
    )
    facts = [text for some, _, _ in chains for text in some]
    woven = names.weave(facts, question)
    wrong = [name for _, some, _ in chains[1:] for name in some]
    return _row(woven, question, variables, wrong, texts)


def word_list(ground: Ground, rng, tokens: int, depth: float, *, kind: str) -> dict:
    """The most "common" or "frequent" words of a list.

    "common": a numbered list has ten words thirty times each, the others three times. "frequent":
    the three most frequent words of a text whose words follow a power law.
    """
    names = Draft(ground, rng, tokens)
    top, rest = (10, 3) if kind == "common" else (3, 0)
    question = (
        f"The document is a list of words. Which {top} words are the most {kind} in it? {ANSWER}"
        f"the {top} words, separated by commas."
    )
    cost = ground.count(" velmar") + (ground.count(" 1000.") if kind == "common" else 0)
    room = (tokens - ground.count(question) - 16) // max(1, cost)
    if kind == "common":
        scale = min(1.0, room / (2 * 30 * top))  # short documents: fewer repetitions
        counts = [max(rest + 2, int(30 * scale))] * top
    else:  # zeta law: the k-th word is about k^-2 of the text, far enough apart
        shares = 1 / np.arange(1, 200) ** 2.0
        counts = [int(n) for n in np.round(room * shares / shares.sum()) if n]
    words = [names.place().lower() for _ in counts]
    pool = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
    while rest and len(pool) + rest <= room:
        pool += [names.place().lower()] * rest
    pool = [str(word) for word in rng.permutation(pool)]

    pieces = [f"{i}. {w}" for i, w in enumerate(pool, 1)] if kind == "common" else pool
    text, length = _longest(ground, pieces, tokens - ground.count("\n\n" + question) - 2)
    kept = Counter(pool[: text.count(" ") // (2 if kind == "common" else 1) + 1])
    order = [word for word, _ in kept.most_common()]
    if kept[order[top - 1]] <= kept[order[top]] or set(order[:top]) != set(words[:top]):
        raise ValueError(f"lengths: {tokens} tokens are too few to tell the most {kind} words")
    woven = Woven(text, length + ground.count(question) + 2, [], [])
    return _row(woven, question, order[:top], order[top : top + 8], [])


def _longest(ground: Ground, pieces: list[str], room: int) -> tuple[str, int]:
    """As many pieces, with spaces between, as fit into `room` tokens; the text and its tokens."""
    kept, used, block = [], 0, 256
    while block and len(kept) < len(pieces):
        text = " ".join(pieces[len(kept) : len(kept) + block])
        cost = ground.count(" " + text)
        if used + cost <= room:
            kept += pieces[len(kept) : len(kept) + block]
            used += cost
        else:
            block //= 2
    return " ".join(kept), used


def question_answering(ground: Ground, rng, tokens: int, depth: float) -> dict:
    """One question over labelled passages with distractors, answered without quotes."""
    made = grounding.quoting(Draft(ground, rng, tokens))
    right = made["aliases"][0]
    made |= dict.fromkeys(("response_reference", "privileged"), f"Answer: {right}")
    return made | {
        "question": made["question"].removesuffix(grounding.RULES) + ANSWER + "the value alone.",
        "answer": right,
        "reward": "dgrpo.rewards:exact_match",
        "passage_ids": [],
        "passages": [],
    }


def _row(woven: Woven, question, right, wrong, gold: list[str]) -> dict:
    one = len(right) == 1
    answer = ", ".join(right)
    return row(
        woven,
        gold=gold,
        family="ruler",
        task="",
        question=question,
        answer=answer,
        reward="exact_match" if one else "item_f1",
        reference=f"Answer: {answer}",
        aliases=list(right) if one else [],
        items=[] if one else list(right),
        distractors=list(wrong),
    )


TASKS: dict[str, Callable[[Ground, np.random.Generator, int, float], dict]] = {
    "single_needle": needles,
    "multi_key": partial(needles, others=None),
    "multi_value": partial(needles, values=4, others=4),
    "multi_query": partial(needles, keys=4, others=4),
    "variable_tracing": variable_tracing,
    "common_words": partial(word_list, kind="common"),
    "frequent_words": partial(word_list, kind="frequent"),
    "question_answering": question_answering,
}
