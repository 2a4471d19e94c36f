"""Retrieve, then generate (ICR², arXiv 2501.08248): copy the supporting passages, then answer.

The completion first copies every passage that it needs, with its label, between `<RETRIEVAL>`
and `</RETRIEVAL>`, then gives the answer on a line of its own. SFT trains on the column
`response_reference` (`completion` of a source, with `where: {family: retrieval}`); the reward
`dgrpo.rewards:retrieval` compares with `passages` and `passage_ids`.
"""

from dgrpo.longblocks.tasks.facts import Draft, row
from dgrpo.longblocks.tasks.multihop import RELATIONS, called, described, relation_chain

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
    answers = called(start + hops, entities[-1])
    copied = [f"[{label}] {text}" for label, text in zip(woven.labels, gold, strict=False)]
    return row(
        woven,
        gold=gold,
        question=question,
        answer="\n".join(["<RETRIEVAL>", *copied, "</RETRIEVAL>", f"Answer: {answers[0]}"]),
        reward="retrieval",
        aliases=answers,
        distractors=wrong,
    )
