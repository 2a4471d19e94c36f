"""Contextual grounding: answers with exact quotes and citations, or the admission that none exists.

The document is labelled passages about invented lighthouses among labelled real text. The answer is
a line `Answer: value` and, for every passage it rests on, a line `Quote: "sentence" [P12]`.
"""

import numpy as np

from dgrpo.longblocks.tasks.facts import (
    Ground,
    Names,
    choose,
    distractor_count,
    pick,
    row,
    weave_passages,
)
from dgrpo.longblocks.tasks.lighthouse import ATTRIBUTES, Attribute, intro, value

FAMILY = "grounding"
ABSTAIN = "not answerable"
NUMERIC = [a for a in ATTRIBUTES if a.high]
RULES = (
    'Write a line "Answer: " with the value alone; then, for every passage that the answer rests '
    'on, a line of the form Quote: "one whole sentence, word for word" [label of the passage]. '
    f'If the document does not say it, write only "Answer: {ABSTAIN}".'
)


def quoting(ground: Ground, rng: np.random.Generator, tokens: int) -> dict:
    """One passage holds the answer; others tell the same of other lighthouses."""
    names = Names(rng)
    place, asked = names.place(), choose(rng, ATTRIBUTES)
    right = value(asked, names)
    gold = [_passage(names, rng, place, asked, right)]
    facts, wrong = _others(ground, rng, tokens, names, place, asked)
    question = f"{asked.question.format(x=place)} {RULES}"
    return _row(ground, rng, tokens, "quoting", question, right, gold, facts, wrong)


def contradicting(ground: Ground, rng: np.random.Generator, tokens: int) -> dict:
    """Two sources disagree: the question names one of them, or wants both weighed."""
    names = Names(rng)
    place, asked = names.place(), choose(rng, NUMERIC)
    values = [value(asked, names) for _ in range(2)]
    sources = ["the survey of the harbour office", "the log of the coast guard"]
    rng.shuffle(sources)
    texts = [
        f"According to {source}, {_lower(asked.sentence.format(x=place, v=v))}"
        for source, v in zip(sources, values, strict=True)
    ]
    gold = [(f"{intro(place, rng)} {text}", text) for text in texts]
    others, wrong = _others(ground, rng, tokens, names, place, asked)
    if rng.integers(2):
        which = pick(rng, 0, 1)
        question = f"By {sources[which]}: {asked.question.format(x=place)} {RULES}"
        right, needed = values[which], [gold[which]]
        others.insert(0, gold[1 - which][0])
        wrong.insert(0, values[1 - which])
    else:
        more = bool(rng.integers(2))
        right = (max if more else min)(values, key=int)
        question = (
            f"Two passages disagree. {asked.question.format(x=place)} Give the "
            f"{'larger' if more else 'smaller'} of the two values and quote both. {RULES}"
        )
        needed = gold
        wrong.insert(0, next(v for v in values if v != right))
    return _row(ground, rng, tokens, "contradicting", question, right, needed, others, wrong)


def superseded(ground: Ground, rng: np.random.Generator, tokens: int) -> dict:
    """Several dated statements, in any order: the latest one counts."""
    names = Names(rng)
    place, asked = names.place(), choose(rng, NUMERIC)
    dated = sorted((names.date(), value(asked, names)) for _ in range(pick(rng, 2, 4)))
    texts = [
        f"As of {when}, {_lower(asked.sentence.format(x=place, v=v))}" for (_, when), v in dated
    ]
    passages = [(f"{intro(place, rng)} {text}", text) for text in texts]
    others, wrong = _others(ground, rng, tokens, names, place, asked)
    others = [text for text, _ in passages[:-1]] + others
    question = (
        "Later statements replace earlier ones. By the latest one: "
        f"{asked.question.format(x=place)} {RULES}"
    )
    *earlier, right = [v for _, v in dated]
    wrong, gold = earlier + wrong, passages[-1:]
    return _row(ground, rng, tokens, "superseded", question, right, gold, others, wrong)


def unanswerable(ground: Ground, rng: np.random.Generator, tokens: int) -> dict:
    """The document tells other things of this lighthouse, and this thing of others."""
    names = Names(rng)
    place, asked = names.place(), choose(rng, ATTRIBUTES)
    facts, wrong = _others(ground, rng, tokens, names, place, asked)
    question = f"{asked.question.format(x=place)} {RULES}"
    return _row(ground, rng, tokens, "unanswerable", question, None, [], facts, wrong)


def _passage(names, rng, place: str, asked: Attribute, answer: str) -> tuple[str, str]:
    """A passage that tells what is asked and one thing more, and the sentence of the former."""
    extra = choose(rng, [a for a in ATTRIBUTES if a is not asked])
    told = ((asked, answer), (extra, value(extra, names)))
    sentences = [a.sentence.format(x=place, v=v) for a, v in told]
    order = rng.permutation(2)
    return " ".join([intro(place, rng), *(sentences[i] for i in order)]), sentences[0]


def _others(ground, rng, tokens, names, place, asked) -> tuple[list[str], list[str]]:
    """Passages that look like the answer: what is asked, of others; other things, of this one."""
    others = [a for a in ATTRIBUTES if a is not asked]
    same = [others[i] for i in rng.permutation(len(others))[:2]]
    texts = [f"{intro(place, rng)} {a.sentence.format(x=place, v=value(a, names))}" for a in same]
    wrong = []
    for _ in range(distractor_count(tokens, 2 * ground.count(texts[0]))):
        wrong.append(value(asked, names))
        texts.append(_passage(names, rng, names.place(), asked, wrong[-1])[0])
    return texts, wrong


def _row(ground, rng, tokens, task, question, right, gold, others, wrong) -> dict:
    """`gold`: (passage, sentence to quote) pairs; `right` None: not answerable."""
    passages = [text for text, _ in gold]
    woven = weave_passages(ground, rng, passages + others, tokens, question)
    pairs = zip(gold, woven.labels, strict=False)
    quotes = [f'Quote: "{sentence}" [{label}]' for (_, sentence), label in pairs]
    answer = "\n".join([f"Answer: {right or ABSTAIN}", *quotes])
    return row(
        woven,
        gold=passages,
        family=FAMILY,
        task=task,
        question=question,
        answer=answer,
        reward="grounded",
        aliases=[right] if right else [ABSTAIN],
        distractors=wrong,
        answerable=right is not None,
    )


def _lower(sentence: str) -> str:
    """A sentence to follow a comma."""
    return sentence[0].lower() + sentence[1:] if sentence.startswith("The ") else sentence
