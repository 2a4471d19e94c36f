"""Retrieve, then generate (ICR², arXiv 2501.08248): copy the supporting passages, then answer.

The completion first copies every passage that it needs, with its label, between `<RETRIEVAL>`
and `</RETRIEVAL>`, then gives the answer on a line of its own. SFT trains on the column
`response_reference` (`completion` of a source, with `where: {family: retrieval}`); the reward
`dgrpo.rewards:retrieval` compares with `passages` and `passage_ids`.
"""

import re
from collections.abc import Sequence

import numpy as np

from dgrpo.longblocks.tasks.facts import Draft, Woven, row
from dgrpo.longblocks.tasks.multihop import RELATIONS, called, described, relation_chain
from dgrpo.text import BadRow

RULES = (
    "First copy every passage that the answer needs, word for word, each on a line of its own "
    "after its label in brackets, between a line <RETRIEVAL> and a line </RETRIEVAL>. Then write "
    'a line "Answer: " with the answer alone.'
)
ASIDES = (
    "Little else is known about this.",
    "The archive has no picture of it.",
    "A copy of this note was sent to the county.",
    "This was confirmed twice in the same year.",
)


def retrieval(draft: Draft) -> dict:
    """A question over 2 to 4 relations, each told by a passage, among passages that look alike."""
    hops = draft.pick(2, 4)
    start = draft.pick(0, len(RELATIONS) - 1 - hops)
    texts, entities = relation_chain(draft, start, hops)
    gold = [f"{text} {draft.choose(ASIDES)}" for text in texts]
    others = [f"Much has been written about {name}, and most of it is lost." for name in entities]
    wrong = entities[:-1]
    cost = draft.count(gold[0])
    for _ in range(max(1, draft.distractors(cost) // hops)):
        more, passed = relation_chain(draft, start, hops)
        others += [f"{text} {draft.choose(ASIDES)}" for text in more]
        wrong.append(passed[-1])
    question = f"By what these passages say, name {described(start, hops, entities[0])}. {RULES}"
    woven = draft.weave_passages(gold + others, question)
    return _row(woven, question, gold, called(start + hops, entities[-1]), wrong)


def from_passages(
    question: str,
    answers: Sequence[str],
    supporting: Sequence[str],
    others: Sequence[str],
    rng: np.random.Generator,
) -> dict:
    """A row of this format from passages of any data set with supporting ones marked.

    Args:
        question: the bare question; the rules of the format are added.
        answers: what counts as right; the first one is the reference.
        supporting: the passages that the answer needs.
        others: passages to confound, best those that a retriever finds for the question.
        rng: of the passages' order.

    Raises:
        BadRow: no answer, no supporting passage, or one among the others.
    """
    if not answers or not supporting:
        raise BadRow("no answer or no supporting passage", question[:80])
    flat = [re.sub(r"\s+", " ", text).strip() for text in [*supporting, *others]]
    if set(flat[: len(supporting)]) & set(flat[len(supporting) :]):
        raise BadRow("a supporting passage among the others", question[:80])
    order = rng.permutation(len(flat)).tolist()
    document = "\n\n".join(f"[P{number}] {flat[i]}" for number, i in enumerate(order, 1))
    places = [order.index(i) for i in range(len(flat))]
    depths, labels = [place / len(flat) for place in places], [f"P{p + 1}" for p in places]
    woven = Woven(document, 0, depths, labels)
    made = _row(woven, f"{question} {RULES}", flat[: len(supporting)], list(answers), [])
    return made | {"family": "retrieval", "task": "retrieval"}


def _row(woven: Woven, question: str, gold: list[str], answers: list[str], wrong) -> dict:
    copied = [f"[{label}] {text}" for label, text in zip(woven.labels, gold, strict=False)]
    answer = "\n".join(["<RETRIEVAL>", *copied, "</RETRIEVAL>", f"Answer: {answers[0]}"])
    return row(
        woven,
        gold=gold,
        question=question,
        answer=answer,
        reward="retrieval",
        aliases=answers,
        distractors=wrong,
    )
