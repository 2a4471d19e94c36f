"""Short answers: what counts as right, and that no trick earns more than an honest guess."""

import pytest

from dgrpo.longblocks.rewards import exact_match, final_number, item_f1, math, token_f1
from dgrpo.longblocks.rewards.matching import final_answer, normalise

CITIES = ["Paris", "London", "Rome", "Oslo", "Cairo", "Lima", "Quito", "Bern"]


def one(reward, completion, **columns):
    """The reward of one completion, its parts aside."""
    found = reward([""], [completion], **{name: [value] for name, value in columns.items()})
    return (found["reward"] if isinstance(found, dict) else found)[0]


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("Paris", "Paris"),
        ("I think so.\nAnswer: Paris\n", "Paris"),
        ("Answer: London\nNo.\nAnswer: Paris", "Paris"),
        ("**Answer:** Paris", "Paris"),
        ("Final answer: Paris\nQuote: x", "Paris"),
        ("Answer:\nParis", "Paris"),
        ("<think>Answer: Rome</think>\nParis", "Paris"),
        ("LeraxMivax\nMivax42\n", "Mivax42"),
        ("the answer: is hidden\nin a line", "in a line"),
        ("", ""),
        ("Answer:", ""),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "same",
    [
        ("The Eiffel Tower.", "eiffel  tower"),
        ("1,250,000", "1250000"),
        ("“Ünal”", "ünal"),
        ("(42)", "42"),
        ("Straße", "STRASSE"),
        ("ﬁve", "five"),
        ("- 3", "3"),
    ],
    ids=str,
)
def test_normal_forms_that_agree(same):
    assert normalise(same[0]) == normalise(same[1])


@pytest.mark.parametrize(
    "other",
    [("-3.5", "35"), ("3.5", "35"), ("-7", "7"), ("50%", "50"), ("x_1", "x1"), ("==", "!=")],
)
def test_normal_forms_that_differ(other):
    assert normalise(other[0]) != normalise(other[1])


def test_exact_match_over_aliases():
    assert one(exact_match, "Answer: NYC", aliases=["New York", "NYC"]) == 1
    assert one(exact_match, "Answer: new york", answer="x", aliases=["New York", "NYC"]) == 1
    assert one(exact_match, "Paris.", answer="Paris") == 1
    assert one(exact_match, "Paris, France", answer="Paris") == 0
    with pytest.raises(ValueError, match="row without answer and aliases"):
        one(exact_match, "Paris", aliases=[])


def test_token_f1():
    found = token_f1(
        [""] * 3, ["John Smith", "Smith", "it is John Smith"], answer=["John Smith"] * 3
    )
    assert found["f1"] == pytest.approx([1, 2 / 3, 2 / 3])
    assert found["reward"] == pytest.approx([1, 2 / 3, 1 / 3])


def test_item_f1_wants_every_item_and_no_other():
    gold = {"items": CITIES[:4]}
    assert one(item_f1, "Answer: Oslo, Rome, London and Paris", **gold) == 1
    assert one(item_f1, "Answer: Oslo, Rome, London", **gold) == pytest.approx(6 / 7)
    assert one(item_f1, "Answer: Oslo, Rome, London, Paris, Bern", **gold) < 6 / 7
    assert one(item_f1, "Answer: Oslo, Oslo, Oslo, Oslo", **gold) < one(
        item_f1, "Answer: Oslo", **gold
    )
    assert one(item_f1, "Answer: 1,000, 20", items=["20", "1000"]) == 1
    with pytest.raises(ValueError, match="row without items"):
        one(item_f1, "x", items=[])


@pytest.mark.parametrize("reward", [exact_match, token_f1, final_number], ids=lambda f: f.__name__)
@pytest.mark.parametrize("k", [2, 3, 8])
def test_a_list_earns_no_more_than_a_guess_from_it(reward, k):
    right, wrong = ("Paris", CITIES[1:]) if reward is not final_number else ("0", "1234567")
    for place in range(k):  # the right one anywhere in the list
        names = list(wrong[: k - 1])
        names.insert(place, right)
        gain = one(reward, "Answer: " + ", ".join(names), answer=right)
        if reward is final_number:
            assert gain == (place == k - 1), "the last one is the answer"
        else:
            assert gain <= 1 / k + 1e-9


def test_a_list_of_all_items_earns_no_more_than_a_guess_of_as_many():
    everything = one(item_f1, "Answer: " + ", ".join(CITIES), items=CITIES[:2])
    guesses = [
        one(item_f1, f"Answer: {a}, {b}", items=CITIES[:2])
        for a in CITIES
        for b in CITIES
        if a != b
    ]
    assert everything <= sum(guesses) / len(guesses)


DOCUMENT = "The capital is Paris.\nLondon is not.\n" * 200


TRICKS = {
    "empty": "",
    "blank": " \n\n",
    "document": DOCUMENT,
    "repetition": "Paris " * 300,
    "alternation": "Answer: " + "Paris London " * 100,
    "empty box": "\\boxed{}",
    "empty answer": "Answer:",
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("reward", [exact_match, token_f1, math], ids=lambda f: f.__name__)
def test_tricks_earn_nothing(reward, trick):
    answer = "17" if reward is math else "Paris"
    assert one(reward, TRICKS[trick].replace("Paris", answer), answer=answer) < 0.05


@pytest.mark.parametrize(
    "trick", ["", " \n", "It is 17.\nIt is not 18.\n" * 99, "17 18 " * 50, "<think>17</think>"]
)
def test_tricks_with_numbers_earn_nothing(trick):
    assert one(final_number, trick, answer="17") == 0


def test_final_number():
    assert one(final_number, "LeraxMivax\nMivax42\n", aliases=["42"]) == 1
    assert one(final_number, "Mivax42", aliases=["Mivax42"]) == 1
    assert one(final_number, "42 or 43", aliases=["42"]) == 0
    assert one(final_number, "1,024", answer="1024") == 1
    assert one(final_number, "so $18.00.", answer="18") == 1
    assert one(final_number, "-7", answer="7") == 0
    assert one(final_number, "3-7", answer="7") == 1
    assert one(final_number, "1.2.3", answer="1.2.3") == 1
    assert one(final_number, "none", answer="5") == 0


@pytest.mark.parametrize(
    "completion, answer, right",
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{3} no, \boxed{x^2 + 2x + 1}", "(x+1)^2", 1),
        ("Answer: 1,000", "1000", 1),
        ("x = 5", "$5$", 1),
        (r"\boxed{\{1, 2\}}", r"\boxed{\{2, 1\}}", 1),
        (r"\boxed{6}", "5", 0),
        ("3, 4, 5", "5", 0),
        ("3 or 4 or 5", "5", 0),
        (r"\boxed{3, 5}", "5", 0),
    ],
)
def test_math(completion, answer, right):
    assert one(math, completion, answer=answer) == right


def test_math_reads_solutions_and_works_off_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    assert math([""], [r"\boxed{7}"], solution=[r"So it is \boxed{7}."]) == [1]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(math, [""], ["7"], answer=["7"]).result() == [1]
