"""Citations, quotations, abstention, retrieval; and tricks that must not pay."""

import pytest

from dgrpo.longblocks.rewards import abstention, citation, grounded, retrieval

TEXTS = {
    "P1": "The Velmar lighthouse was built in 1820. It has 212 steps.",
    "P2": "The Norvik lighthouse was built in 1790. Its keeper is  Ada Holt.",
    "P10": "Some words about the weather of the coast and of the sea.",
    "P11": "The Velmar lighthouse was repaired in 1911 by two masons.",
}
DOCUMENT = "\n\n".join(f"[{label}] {text}" for label, text in TEXTS.items())
ROW = {
    "aliases": ["1820"],
    "passage_ids": ["P1"],
    "passages": [TEXTS["P1"]],
    "answerable": True,
    "document": DOCUMENT,
}
QUOTE = 'Quote: "The Velmar lighthouse was built in 1820." [P1]'


def one(reward, completion, **columns):
    columns = {**ROW, **columns}
    found = reward([""], [completion], **{name: [value] for name, value in columns.items()})
    return {name: values[0] for name, values in found.items()}


@pytest.mark.parametrize(
    "completion, value",
    [
        (f"Answer: 1820\n{QUOTE}", 1.0),
        (f"{QUOTE}\nAnswer: 1820", 1.0),
        (f"It says so.\n{QUOTE}\nAnswer: 1820", 1.0),
        ("Answer: 1820\n" + QUOTE.replace("lighthouse was", "lighthouse  was"), 1.0),
        ("Answer: 1820", 0.5),
        (f"Answer: 1821\n{QUOTE}", 0.0),
        (f"Answer: 1820 or 1821\n{QUOTE}", 0.0),
        ("Answer: 1820\n" + QUOTE.replace("P1", "P2"), 0.5),
        ("Answer: 1820\n" + QUOTE.replace("built", "erected"), 0.5),
        ('Answer: 1820\nQuote: "built in 1820" [P1]', 0.5),
        ("Answer: not answerable", 0.0),
        ("", 0.0),
        (DOCUMENT, 0.0),
        ("1820 " * 200, 0.0),
    ],
    ids=[
        "as asked",
        "quotation first",
        "with words before",
        "other white space",
        "no quotation",
        "wrong answer",
        "list of answers",
        "wrong label",
        "quotation changed",
        "quotation too short",
        "abstained",
        "empty",
        "copy of the document",
        "repetition",
    ],
)
def test_grounded(completion, value):
    assert one(grounded, completion)["reward"] == pytest.approx(value)


def test_grounded_pays_less_for_every_needless_quotation():
    every = "\n".join(f'Quote: "{text}" [{label}]' for label, text in TEXTS.items())
    found = one(grounded, f"Answer: 1820\n{every}")
    assert found["citation_precision"] == 0.25 and found["citation_recall"] == 1
    assert found["quote"] == 1 and found["reward"] == pytest.approx(0.5 + 0.5 * 0.4 * 0.25)
    twice = one(grounded, f"Answer: 1820\n{QUOTE}\n{QUOTE}")
    assert 0.5 < twice["reward"] < 0.9
    malformed = one(grounded, f"Answer: 1820\n{QUOTE}\nQuote: everything")
    assert malformed["quote"] == 0.5 and malformed["reward"] < 1


def test_grounded_where_the_document_has_no_answer():
    row = {"answerable": False, "passage_ids": [], "passages": [], "aliases": ["not answerable"]}
    for completion, value in {
        "Answer: not answerable": 1,
        "It has nothing.\nAnswer: Not answerable.": 1,
        "Answer: 1820": 0,
        "Answer: 1820, or not answerable": 0,
        f"Answer: not answerable\n{QUOTE}": 0,
        "": 0,
    }.items():
        assert one(grounded, completion, **row)["reward"] == value, completion


def test_grounded_without_a_document_reads_the_passages():
    assert one(grounded, f"Answer: 1820\n{QUOTE}", document=None)["reward"] == 1


def test_what_looks_like_another_label_is_part_of_a_passage():
    document = DOCUMENT.replace("[P2] ", "[P2] x = [\n[A1],\n] ")
    row = {"aliases": ["Ada Holt"], "passage_ids": ["P2"], "passages": [""], "document": document}
    completion = 'Answer: Ada Holt\nQuote: "built in 1790. Its keeper is Ada Holt." [P2]'
    assert one(grounded, completion, **row)["reward"] == 1


def test_abstention():
    texts = ["1820", "not answerable", "unanswerable", "1820 not answerable", ""]
    columns = {"aliases": [["1820"]] * 5}
    can = abstention([""] * 5, texts, answerable=[True] * 5, **columns)
    cannot = abstention([""] * 5, texts, answerable=[False] * 5, **columns)
    assert can["reward"] == [1, 0, 0, 0, 0]
    assert cannot["reward"] == [0, 1, 1, 0, 0]
    assert can["abstained"] == [0, 1, 1, 0, 0]


def test_citation():
    texts = ["So [P1] and [P11].", "[P1]", "[P1] [P1]", "[P1] [P2] [P10] [P11]", "none", ""]
    found = citation([""] * 6, texts, passage_ids=[["P1", "P11"]] * 6)
    assert found["precision"] == [1, 1, 1, 0.5, 0, 0]
    assert found["recall"] == [1, 0.5, 0.5, 1, 0, 0]
    assert found["reward"] == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3, 0, 0])
    assert one(citation, DOCUMENT)["reward"] == pytest.approx(0.4 * 0.25), "all labels"


BLOCK = f"<RETRIEVAL>\n[P1] {TEXTS['P1']}\n</RETRIEVAL>\n"


@pytest.mark.parametrize(
    "completion, value",
    [
        (BLOCK + "Answer: 1820", 1.0),
        (BLOCK.replace("1820. ", "1820.\n") + "1820", 1.0),
        (BLOCK + "Answer: 1821", 0.0),
        ("Answer: 1820", 0.5),
        (BLOCK.replace("steps", "rooms").replace("212", "3") + "Answer: 1820", 0.5),
        (BLOCK + BLOCK + "Answer: 1820", 0.5),
        (f"<RETRIEVAL>\n{DOCUMENT}\n</RETRIEVAL>\nAnswer: 1820", 0.5 + 0.5 * 0.4 * 0.25),
        (BLOCK, 0.0),
        ("", 0.0),
    ],
    ids=[
        "as asked",
        "line break, no label",
        "wrong answer",
        "nothing retrieved",
        "changed passage",
        "two blocks",
        "copy of the document",
        "no answer",
        "empty",
    ],
)
def test_retrieval(completion, value):
    found = one(retrieval, completion)
    assert found["reward"] == pytest.approx(value), found
