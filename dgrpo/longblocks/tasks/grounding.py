"""Contextual grounding: answers with exact quotes and citations, or the admission that none exists.

The document is labelled passages about invented lighthouses among labelled real text.
"""

from typing import NamedTuple

from dgrpo.longblocks.tasks.facts import Draft, row


class Attribute(NamedTuple):
    """One property of a lighthouse; a number in [low, high), or a name."""

    key: str  # a word of the sentence that stands for the property
    section: str  # heading under which a report tells it
    sentence: str  # of {x}, the lighthouse, and {v}, the value
    question: str  # of {x}
    low: int = 0
    high: int = 0


# fmt: off
ATTRIBUTES = tuple(Attribute(*fields) for fields in (
    ("tall", "Building", "The tower of the {x} lighthouse is {v} feet tall.",
     "How many feet tall is the tower of the {x} lighthouse?", 31, 400),
    ("days", "Building", "The building of the {x} lighthouse took {v} days.",
     "How many days did the building of the {x} lighthouse take?", 401, 900),
    ("steps", "Building", "The stair of the {x} lighthouse has {v} steps.",
     "How many steps does the stair of the {x} lighthouse have?", 901, 1400),
    ("crowns", "Building", "The work on the {x} lighthouse cost {v} crowns.",
     "How many crowns did the work on the {x} lighthouse cost?", 10_000, 99_999),
    ("candles", "Light", "The lamp of the {x} lighthouse is as bright as {v} candles.",
     "As bright as how many candles is the lamp of the {x} lighthouse?", 500_000, 999_999),
    ("barrels", "Light", "The lamp of the {x} lighthouse burns {v} barrels of oil in a year.",
     "How many barrels of oil does the lamp of the {x} lighthouse burn in a year?", 1401, 2400),
    ("hours", "Light", "The lamp of the {x} lighthouse was lit for {v} hours last year.",
     "For how many hours was the lamp of the {x} lighthouse lit last year?", 2401, 4000),
    ("kilograms", "Light", "The fog bell of the {x} lighthouse weighs {v} kilograms.",
     "How many kilograms does the fog bell of the {x} lighthouse weigh?", 4001, 8000),
    ("keeper", "People", "The keeper of the {x} lighthouse is called {v}.",
     "What is the keeper of the {x} lighthouse called?"),
    ("inspector", "People", "The inspector of the {x} lighthouse is called {v}.",
     "What is the inspector of the {x} lighthouse called?"),
    ("boat", "People", "The boat of the {x} lighthouse is called the {v}.",
     "What is the boat of the {x} lighthouse called?"),
    ("visitors", "People", "The {x} lighthouse had {v} visitors in its best year.",
     "How many visitors did the {x} lighthouse have in its best year?", 100_000, 400_000),
))
# fmt: on
INTROS = (
    "The {x} lighthouse stands on a rock before the coast.",
    "Sailors have known the {x} lighthouse for a long time.",
    "Some things about the {x} lighthouse were written down.",
    "The {x} lighthouse has a file of its own in the archive.",
)
NUMERIC = [a for a in ATTRIBUTES if a.high]
ABSTAIN = "not answerable"
RULES = (
    'Write a line "Answer: " with the value alone; then, for every passage that the answer rests '
    'on, a line of the form Quote: "one whole sentence, word for word" [label of the passage]. '
    f'If the document does not say it, write only "Answer: {ABSTAIN}".'
)


def value(attribute: Attribute, draft: Draft) -> str:
    """A value that no other attribute of the document has."""
    if attribute.high:
        return str(draft.number(attribute.low, attribute.high))
    return draft.place() if attribute.key == "boat" else draft.person()


def intro(place: str, draft: Draft) -> str:
    """A first sentence that says nothing of use."""
    return draft.choose(INTROS).format(x=place)


def quoting(draft: Draft) -> dict:
    """One passage holds the answer; others tell the same of other lighthouses."""
    place, asked = draft.place(), draft.choose(ATTRIBUTES)
    right = value(asked, draft)
    gold = [_passage(draft, place, asked, right)]
    question = f"{asked.question.format(x=place)} {RULES}"
    return _row(draft, question, right, gold, *_others(draft, place, asked))


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
    return _row(draft, question, right, passages[-1:], others, earlier + wrong)


def unanswerable(draft: Draft) -> dict:
    """The document tells other things of this lighthouse, and this thing of others."""
    place, asked = draft.place(), draft.choose(ATTRIBUTES)
    question = f"{asked.question.format(x=place)} {RULES}"
    return _row(draft, question, None, [], *_others(draft, place, asked))


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
