"""Multi-hop reasoning: chains of facts, counting and comparing over many places of a document.

`retrieval` is one more: the passages that the answer needs are copied first (arXiv 2501.08248).
"""

from itertools import pairwise

from dgrpo.longblocks.tasks.facts import ANSWER, Draft, row

# type, sentence (from a to b), the description of b given a description of a
RELATIONS = (
    ("person", "{a} works at the {b} depot.", "the depot where {x} works"),
    ("depot", "The {a} depot gets its grain from the {b} mill.", "the mill that supplies {x}"),
    ("mill", "The {a} mill stands in the town of {b}.", "the town where {x} stands"),
    ("town", "The town of {a} is governed by {b}.", "the person who governs {x}"),
    ("warden", "{a} was taught by {b}.", "the teacher of {x}"),
    ("teacher", "{a} was born in the village of {b}.", "the village where {x} was born"),
    ("village", "", ""),
)
PEOPLE = ("person", "warden", "teacher")
CALLED = {"depot": "{} depot", "mill": "{} mill", "town": "town of {}", "village": "village of {}"}
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


def variable_tracing(draft: Draft) -> dict:
    """Follow 2 to 6 references from one dial to another, down to a number."""
    hops = draft.pick(2, 6)
    texts, dials, wrong = _chains(draft, lambda: _dials(draft, hops))
    question = (
        f"Dials in this document take their readings from other dials. Which number does the dial "
        f"{dials[0]} show? {ANSWER.format('the number')}"
    )
    return _row(draft, question, texts, hops, dials[-1], wrong)


def _dials(draft: Draft, hops: int) -> tuple[list[str], list[str]]:
    dials = [draft.place() for _ in range(hops)]
    value = str(draft.number(10_000, 100_000))
    texts = [f"The dial {a} always shows what the dial {b} shows." for a, b in pairwise(dials)]
    return [*texts, f"The dial {dials[-1]} shows {value}."], [*dials, value]


def relations(draft: Draft) -> dict:
    """Follow 2 to 6 different relations between people, depots, mills, towns and villages."""
    hops = draft.pick(2, 6)
    start = draft.pick(0, 6 - hops)
    texts, entities, wrong = _chains(draft, lambda: _relation_chain(draft, start, hops))
    question = (
        f"By what this document says, name {_described(start, hops, entities[0])}. "
        f"{ANSWER.format('the name')}"
    )
    made = _row(draft, question, texts, hops, entities[-1], entities[:-1] + wrong)
    return made | {"aliases": _called(start + hops, entities[-1])}


def _relation_chain(draft: Draft, start: int, hops: int) -> tuple[list[str], list[str]]:
    """The facts of a chain from the `start`-th relation on, and its `hops + 1` entities."""
    kinds = [RELATIONS[start + i][0] for i in range(hops + 1)]
    entities = [draft.person() if kind in PEOPLE else draft.place() for kind in kinds]
    pairs = enumerate(pairwise(entities), start)
    return [RELATIONS[i][1].format(a=a, b=b) for i, (a, b) in pairs], entities


def _called(place: int, name: str) -> list[str]:
    """What the entity at a place of `RELATIONS` may be called, the bare name first."""
    kind = RELATIONS[place][0]
    return [name, CALLED[kind].format(name)] if kind in CALLED else [name]


def _described(start: int, hops: int, first: str) -> str:
    """The last entity of a chain in words, from its first one."""
    words = _called(start, first)[-1]
    words = first if words == first else f"the {words}"
    for i in range(hops):
        words = RELATIONS[start + i][2].format(x=words)
    return words


def _chains(draft: Draft, make) -> tuple[list[str], list[str], list[str]]:
    """The facts of a chain and of others of its length, its entities, the ends of the others."""
    facts, entities = make()
    cost = draft.count("\n".join(facts)) // len(facts)
    others = [make() for _ in range(max(1, draft.distractors(cost) // len(facts)))]
    more = [fact for some, _ in others for fact in some]
    return facts + more, entities, [ends[-1] for _, ends in others]


def counting(draft: Draft) -> dict:
    """Count, add up or find the largest of 3 to 8 records of one harbour among those of others."""
    many = draft.pick(3, 8 if draft.tokens >= 2000 else 4)
    harbour = draft.place()
    others = [draft.place() for _ in range(max(2, many // 2))]
    records = [(draft.place(), draft.number(11, 900), harbour) for _ in range(many)]
    line = "On {} the ship {} brought {} crates to the harbour of {}."
    cost = draft.count(line.format("11 December 1911", "Velmar", 1111, harbour))
    for _ in range(draft.distractors(cost)):
        records.append((draft.place(), draft.number(11, 9000), str(draft.rng.choice(others))))
    texts = [line.format(draft.date()[1], *record) for record in records]
    largest = max(records[:many], key=lambda record: record[1])[0]
    total = sum(crates for _, crates, _ in records[:many])
    every = sum(crates for _, crates, _ in records)
    to = f"to the harbour of {harbour}"
    ships = [ship for ship, _, _ in records if ship != largest]
    asked, answer, wrong, what = (
        (f"How many ships brought crates {to}", many, [many - 1, many + 1, len(records)], "number"),
        (f"How many crates in all came {to}", total, [total - records[0][1], every], "number"),
        (f"Which ship brought most crates {to}", largest, ships, "name"),
    )[draft.pick(0, 2)]
    question = f"{asked}? {ANSWER.format(f'the {what}')}"
    return _row(draft, question, texts, many, str(answer), wrong)


def comparison(draft: Draft) -> dict:
    """Compare a measurement over the reports of 3 to 6 named stations."""
    many = draft.pick(3, 6)
    line = (
        "Report of the weather station {}: in the year under review {} millimetres of rain were "
        "measured."
    )
    more = draft.distractors(draft.count(line.format("Velmar", 1111)))
    stations = [(draft.place(), draft.number(101, 4000)) for _ in range(many + more)]
    texts = [line.format(name, rain) for name, rain in stations]
    most = bool(draft.rng.integers(2))
    best = (max if most else min)(stations[:many], key=lambda station: station[1])[0]
    listed = [str(name) for name in draft.rng.permutation([name for name, _ in stations[:many]])]
    question = (
        f"Of the weather stations {', '.join(listed[:-1])} and {listed[-1]}, which one measured "
        f"the {'most' if most else 'least'} rain? {ANSWER.format('the name')}"
    )
    wrong = [name for name in listed if name != best]
    return _row(draft, question, texts, many, best, wrong)


def retrieval(draft: Draft) -> dict:
    """A question over 2 to 4 relations, each told by a passage, among passages that look alike."""
    hops = draft.pick(2, 4)
    start = draft.pick(0, len(RELATIONS) - 1 - hops)
    texts, entities = _relation_chain(draft, start, hops)
    gold = [f"{text} {draft.choose(ASIDES)}" for text in texts]
    others = [f"Much has been written about {name}, and most of it is lost." for name in entities]
    wrong = entities[:-1]
    for _ in range(max(1, draft.distractors(draft.count(gold[0])) // hops)):
        more, passed = _relation_chain(draft, start, hops)
        others += [f"{text} {draft.choose(ASIDES)}" for text in more]
        wrong.append(passed[-1])
    question = f"By what these passages say, name {_described(start, hops, entities[0])}. {RULES}"
    woven = draft.weave_passages(gold + others, question)
    answers = _called(start + hops, entities[-1])
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


def _row(draft, question, texts, many, answer, distractors) -> dict:
    """A row whose answer needs the first `many` of the texts."""
    return row(
        draft.weave(texts, question),
        gold=texts[:many],
        question=question,
        answer=answer,
        reward="exact_match",
        reference="\n".join([*texts[:many], f"Answer: {answer}"]),
        aliases=[answer],
        distractors=[str(value) for value in distractors],
    )
