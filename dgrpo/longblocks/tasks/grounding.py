"""Contextual grounding: answers with exact quotes and citations, or the admission that none exists.

The document is labelled passages about invented lighthouses among labelled real text. The answer is
a line `Answer: value` and, for every passage it rests on, a line `Quote: "sentence" [P12]`.
"""

from dgrpo.longblocks.tasks.facts import Draft, row
from dgrpo.longblocks.tasks.lighthouse import ATTRIBUTES, Attribute, intro, value

ABSTAIN = "not answerable"
NUMERIC = [a for a in ATTRIBUTES if a.high]
RULES = (
    'Write a line "Answer: " with the value alone; then, for every passage that the answer rests '
    'on, a line of the form Quote: "one whole sentence, word for word" [label of the passage]. '
    f'If the document does not say it, write only "Answer: {ABSTAIN}".'
)


def quoting(draft: Draft) -> dict:
    """One passage holds the answer; others tell the same of other lighthouses."""
    place, asked = draft.place(), draft.choose(ATTRIBUTES)
    right = value(asked, draft)
    gold = [_passage(draft, place, asked, right)]
    facts, wrong = _others(draft, place, asked)
    question = f"{asked.question.format(x=place)} {RULES}"
    return _row(draft, question, right, gold, facts, wrong)


def contradicting(draft: Draft) -> dict:
    """Two sources disagree: the question names one of them, or wants both weighed."""
    place, asked = draft.place(), draft.choose(NUMERIC)
    values = [value(asked, draft) for _ in range(2)]
    sources = ["the survey of the harbour office", "the log of the coast guard"]
    draft.rng.shuffle(sources)
    texts = [
        f"According to {source}, {_lower(asked.sentence.format(x=place, v=v))}"
        for source, v in zip(sources, values, strict=True)
    ]
    gold = [(f"{intro(place, draft)} {text}", text) for text in texts]
    others, wrong = _others(draft, place, asked)
    if draft.rng.integers(2):
        which = draft.pick(0, 1)
        question = f"By {sources[which]}: {asked.question.format(x=place)} {RULES}"
        right, needed = values[which], [gold[which]]
        others.insert(0, gold[1 - which][0])
        wrong.insert(0, values[1 - which])
    else:
        more = bool(draft.rng.integers(2))
        right = (max if more else min)(values, key=int)
        question = (
            f"Two passages disagree. {asked.question.format(x=place)} Give the "
            f"{'larger' if more else 'smaller'} of the two values and quote both. {RULES}"
        )
        needed = gold
        wrong.insert(0, next(v for v in values if v != right))
    return _row(draft, question, right, needed, others, wrong)


def superseded(draft: Draft) -> dict:
    """Several dated statements, in any order: the latest one counts."""
    place, asked = draft.place(), draft.choose(NUMERIC)
    dated = sorted((draft.date(), value(asked, draft)) for _ in range(draft.pick(2, 4)))
    texts = [
        f"As of {when}, {_lower(asked.sentence.format(x=place, v=v))}" for (_, when), v in dated
    ]
    passages = [(f"{intro(place, draft)} {text}", text) for text in texts]
    others, wrong = _others(draft, place, asked)
    others = [text for text, _ in passages[:-1]] + others
    question = (
        "Later statements replace earlier ones. By the latest one: "
        f"{asked.question.format(x=place)} {RULES}"
    )
    *earlier, right = [v for _, v in dated]
    wrong, gold = earlier + wrong, passages[-1:]
    return _row(draft, question, right, gold, others, wrong)


def unanswerable(draft: Draft) -> dict:
    """The document tells other things of this lighthouse, and this thing of others."""
    place, asked = draft.place(), draft.choose(ATTRIBUTES)
    facts, wrong = _others(draft, place, asked)
    question = f"{asked.question.format(x=place)} {RULES}"
    return _row(draft, question, None, [], facts, wrong)


def _passage(draft, place: str, asked: Attribute, answer: str) -> tuple[str, str]:
    """A passage that tells what is asked and one thing more, and the sentence of the former."""
    extra = draft.choose([a for a in ATTRIBUTES if a is not asked])
    told = ((asked, answer), (extra, value(extra, draft)))
    sentences = [a.sentence.format(x=place, v=v) for a, v in told]
    order = draft.rng.permutation(2)
    return " ".join([intro(place, draft), *(sentences[i] for i in order)]), sentences[0]


def _others(draft, place, asked) -> tuple[list[str], list[str]]:
    """Passages that look like the answer: what is asked, of others; other things, of this one."""
    others = [a for a in ATTRIBUTES if a is not asked]
    same = [others[i] for i in draft.rng.permutation(len(others))[:2]]
    texts = [f"{intro(place, draft)} {a.sentence.format(x=place, v=value(a, draft))}" for a in same]
    wrong = []
    for _ in range(draft.distractors(2 * draft.count(texts[0]))):
        wrong.append(value(asked, draft))
        texts.append(_passage(draft, draft.place(), asked, wrong[-1])[0])
    return texts, wrong


def _row(draft, question, right, gold, others, wrong) -> dict:
    """`gold`: (passage, sentence to quote) pairs; `right` None: not answerable."""
    passages = [text for text, _ in gold]
    woven = draft.weave_passages(passages + others, question)
    pairs = zip(gold, woven.labels, strict=False)
    quotes = [f'Quote: "{sentence}" [{label}]' for (_, sentence), label in pairs]
    answer = "\n".join([f"Answer: {right or ABSTAIN}", *quotes])
    return row(
        woven,
        gold=passages,
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
