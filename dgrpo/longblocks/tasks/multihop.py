"""Multi-hop reasoning: chains of facts, counting and comparing over many places of a document."""

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
FIRST = {"depot": "the {a} depot", "mill": "the {a} mill", "town": "the town of {a}"}


def variable_tracing(draft: Draft) -> dict:
    """Follow 2 to 6 references from one dial to another, down to a number."""
    hops = draft.pick(2, 6)
    chains = _chains(draft, lambda: _dials(draft, hops))
    start, value = chains[0][1][0], chains[0][1][-1]
    question = (
        f"Dials in this document take their readings from other dials. Which number does the dial "
        f"{start} show? {ANSWER.format('the number')}"
    )
    wrong = [entities[-1] for _, entities in chains[1:]]
    texts = [text for some, _ in chains for text in some]
    return _row(draft, question, texts, hops, value, wrong)


def _dials(draft: Draft, hops: int) -> tuple[list[str], list[str]]:
    dials = [draft.place() for _ in range(hops)]
    value = str(draft.number(10_000, 100_000))
    texts = [f"The dial {a} always shows what the dial {b} shows." for a, b in pairwise(dials)]
    return [*texts, f"The dial {dials[-1]} shows {value}."], [*dials, value]


def relations(draft: Draft) -> dict:
    """Follow 2 to 6 different relations between people, depots, mills, towns and villages."""
    hops = draft.pick(2, 6)
    start = draft.pick(0, 6 - hops)
    chains = _chains(draft, lambda: relation_chain(draft, start, hops))
    entities = chains[0][1]
    question = (
        f"By what this document says, name {described(start, hops, entities[0])}. "
        f"{ANSWER.format('the name')}"
    )
    wrong = entities[:-1] + [others[-1] for _, others in chains[1:]]
    texts = [text for some, _ in chains for text in some]
    made = _row(draft, question, texts, hops, entities[-1], wrong)
    return made | {"aliases": called(start + hops, entities[-1])}


def relation_chain(draft: Draft, start: int, hops: int) -> tuple[list[str], list[str]]:
    """The facts of a chain from the `start`-th relation on, and its `hops + 1` entities."""
    kinds = [RELATIONS[start + i][0] for i in range(hops + 1)]
    entities = [draft.person() if kind in PEOPLE else draft.place() for kind in kinds]
    pairs = enumerate(pairwise(entities), start)
    return [RELATIONS[i][1].format(a=a, b=b) for i, (a, b) in pairs], entities


def called(place: int, name: str) -> list[str]:
    """What the entity at a place of `RELATIONS` may be called, the bare name first."""
    form = CALLED.get(RELATIONS[place][0])
    return [name, form.format(name)] if form else [name]


def described(start: int, hops: int, first: str) -> str:
    """The last entity of a chain in words, from its first one."""
    words = FIRST.get(RELATIONS[start][0], "{a}").format(a=first)
    for i in range(hops):
        words = RELATIONS[start + i][2].format(x=words)
    return words


def _chains(draft: Draft, make) -> list[tuple[list[str], list[str]]]:
    """The asked chain and, to distract, others of the same length."""
    first = make()
    cost = draft.count("\n".join(first[0])) // len(first[0])
    more = draft.distractors(cost) // len(first[0])
    return [first, *(make() for _ in range(max(1, more)))]


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
