"""Long answers: points, form, length; and tricks that must not pay."""

import pytest

from dgrpo.longblocks.rewards import coverage
from dgrpo.longblocks.rewards.long_form import PARTS

POINTS = [["steps", "212"], ["keeper", "Ada Holt"], ["built", "1820"], ["lamp", "24 miles"]]
FACTS = [
    "The tower has 212 steps.",
    "The keeper is called Ada Holt.",
    "It was built in 1820.",
    "The lamp is seen for 24 miles.",
]
FILLER = "Some other words of no use stand here between one fact and the next one of them. " * 3
DOCUMENT = "\n".join(FILLER + fact + " " + FILLER for fact in FACTS)
BULLETS = "\n".join(f"- {fact}" for fact in FACTS)


def one(completion, **columns):
    columns = {"points": POINTS, "form": "bullets", "document": DOCUMENT, **columns}
    found = coverage([""], [completion], **{name: [value] for name, value in columns.items()})
    return {name: values[0] for name, values in found.items()}


@pytest.mark.parametrize(
    "form, text",
    [
        ("bullets", BULLETS),
        ("numbered", "\n".join(f"{i}. {fact}" for i, fact in enumerate(FACTS, 1))),
        ("table", "| what | value |\n|---|---|\n" + "\n".join(f"| {a} | {b} |" for a, b in POINTS)),
        ("sections", f"## One\n{FACTS[0]}\n{FACTS[1]}\n\n## Two\n{FACTS[2]} {FACTS[3]}"),
        ("", " ".join(FACTS)),
        (None, "\n".join(FACTS)),
    ],
    ids=["bullets", "numbered", "table", "sections", "free", "absent"],
)
def test_a_good_answer_in_each_form_has_all(form, text):
    found = one(text, form=form, headings=["One", "Two"], min_words=15, max_words=60)
    assert found == {name: 1.0 for name in ("reward", *PARTS)}


@pytest.mark.parametrize(
    "trick, part, below",
    [
        ("", "coverage", 0.01),
        ("\n \n", "coverage", 0.01),
        (DOCUMENT, "reward", 0.01),
        ("\n".join(f"- {line}" for line in DOCUMENT.splitlines()), "copying", 0.01),
        ("- " + " ".join(FACTS), "coverage", 0.3),
        ("\n".join([BULLETS] * 6), "repetition", 0.3),
        ("- The tower has 212 steps.\n" * 30, "reward", 0.03),
        (BULLETS + "\n- So it is." * 4, "precision", 0.51),
        (BULLETS.replace("- ", ""), "form", 0.01),
        ("\n".join(BULLETS.splitlines()[:2]), "coverage", 0.51),
        (BULLETS.replace("212 steps", "2120 steps"), "coverage", 0.76),
    ],
    ids=[
        "empty",
        "blank",
        "copy of the document",
        "copied paragraphs as items",
        "all in one item",
        "said six times",
        "one fact thirty times",
        "needless items",
        "wrong form",
        "half of the points",
        "another number",
    ],
)
def test_tricks_and_faults_cost(trick, part, below):
    found = one(trick)
    assert found[part] <= below and found["reward"] <= below


def test_naming_all_candidates_in_an_item_covers_nothing():
    listed = BULLETS.replace("212", "212 or 213 or 214")
    assert one(listed, distractors=["213", "214", "1900"])["coverage"] == 0.75
    assert one(BULLETS, distractors=["213", "212", "24"])["coverage"] == 1, "right ones stay right"


def test_length_band():
    words = len(BULLETS.split())
    assert one(BULLETS, min_words=2 * words)["length"] == 0.5
    assert one(BULLETS, max_words=words)["length"] == 1
    assert one(BULLETS, max_words=round(words / 1.5))["length"] == pytest.approx(0.5, abs=0.05)
    assert one(BULLETS, max_words=words // 3)["length"] == 0


def test_sections_must_stand_in_order():
    text = f"## Two\n{FACTS[0]}\n## One\n{FACTS[1]}\n## Three\n{FACTS[2]}"
    found = one(text, form="sections", headings=["One", "Two", "Three"])
    assert found["form"] == pytest.approx(2 / 3)
    empty = one("## One\n## Two\n## Three\n" + FACTS[0], form="sections", headings=["One", "Two"])
    assert empty["form"] == 0


def test_rows_that_cannot_be_scored():
    with pytest.raises(ValueError, match="row without points"):
        one(BULLETS, points=[])
    with pytest.raises(ValueError, match="form: got 'poem'"):
        one(BULLETS, form="poem")
