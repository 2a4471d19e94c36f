"""Scores of the public benchmarks."""

import importlib.util

import pytest

from dgrpo.longblocks.evaluation import scores
from dgrpo.longblocks.evaluation.instructions import CHECKS, follows


def score(name, text, **columns):
    found = getattr(scores, name)([""], [text], **{k: [v] for k, v in columns.items()})
    return found[0]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(c)", "C"),
        ("Answer: D", "D"),
        ("The answer is (A).", "A"),
        ("First I thought the answer is A. But the answer is B", "B"),
        ("so \\boxed{E}", "E"),
        ("I choose C.", "C"),
        ("A or B", None),
        ("A B C D", None),
        ("", None),
        ("The answer is unclear", None),
        ("the answer is a guess\nAnswer: B", "B"),
        ("<think>the answer is A</think>Option C", "C"),
    ],
)
def test_the_letter_that_a_text_settles_on(text, letter):
    assert scores.chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("name", "text", "columns", "expected"),
    [
        ("word_f1", "Answer: the red house", {"answers": ["red house"]}, 1.0),
        ("word_f1", "red", {"answers": ["red house", "x"]}, 2 / 3),
        ("word_f1", "", {"answers": ["x"]}, 0.0),
        ("character_f1", "红色的房子", {"answers": ["红色房子。"]}, 8 / 9),
        ("rouge_l", "a cat sat on mats", {"answers": ["cat sat on red mats"]}, 8 / 9),
        ("rouge_l", "红房子", {"answers": ["红的房子"], "language": "zh"}, 6 / 7),
        ("rouge_l", "", {"answers": ["a b"]}, 0.0),
        ("class_name", "City", {"answers": ["City"], "classes": ["City", "State"]}, 1.0),
        ("class_name", "City or State", {"answers": ["City"], "classes": ["City", "State"]}, 0.5),
        ("class_name", "Big City", {"answers": ["City"], "classes": ["City", "Big City"]}, 0.0),
        ("same_number", "Paragraph 4", {"answers": ["Paragraph 4"]}, 1.0),
        ("same_number", "1 2 3 4", {"answers": ["Paragraph 4"]}, 0.25),
        ("same_number", "none", {"answers": ["4"]}, 0.0),
        ("contained", "Answer: the key is 71432.", {"answers": ["71432"]}, 1.0),
        ("contained", "Answer: 714321", {"answers": ["71432"]}, 0.0),
        ("code_similarity", "```python\nreturn x", {"answers": ["return x"]}, 1.0),
        ("code_similarity", "", {"answers": ["return x"]}, 0.0),
        ("number_list", "1, 2, 4", {"answers": ["1", "2", "3"]}, 2 / 3),
        ("choice", "Answer: B", {"answer": "b"}, 1.0),
    ],
)
def test_values(name, text, columns, expected):
    assert score(name, text, **columns) == pytest.approx(expected)


FOLLOWED = [
    ("keywords:existence", {"keywords": ["Red", "blue"]}, "red and blue", "reddish, blue"),
    ("keywords:frequency", {"keyword": "red", "frequency": 2}, "red red", "red redder"),
    (
        "keywords:frequency",
        {"keyword": "red", "frequency": 2, "relation": "less than"},
        "red",
        "red, red",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["red"]}, "reddish", "so Red"),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        "eEe",
        "ee",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "One. Two!",
        "One and two.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "a b",
        "a b c",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        "First.\n\n'then it",
        "Then.\n\nfirst",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\nP.P.S hi", "P.S. hi"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and **b**",
        "** ** and *b*",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Title>>\ntext", "<< >> text"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it. Done", "Done"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'so. "the end."', "the end. so"),
    ("startend:quotation", {}, '"so"', '"so" it'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A BIG dog",
        "A big dog",
    ),
    ("change_case:english_capital", {}, "ALL 2", "ALl"),
    ("change_case:english_lowercase", {}, "all 2", "aLl"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), FOLLOWED)
def test_instructions(name, arguments, good, bad):
    arguments = arguments | {"unused": None}
    assert follows(name, arguments, good) is True
    assert follows(name, arguments, bad) is False
    assert follows(name, arguments, " ") is False


def test_all_instructions_are_tested_and_unknown_ones_refused():
    tested = {name for name, *_ in FOLLOWED} | {"language:response_language"}
    assert tested == set(CHECKS) | {"combination:repeat_prompt"}
    with pytest.raises(ValueError, match="instruction: got 'x'"):
        follows("x", {}, "text")
    with pytest.raises(ValueError, match="relation"):
        follows("length_constraints:number_words", {"num_words": 1, "relation": "about"}, "text")


@pytest.mark.skipif(
    importlib.util.find_spec("langdetect") is not None, reason="the language can be checked here"
)
def test_a_language_that_cannot_be_checked_is_left_out():
    names = ["language:response_language", "punctuation:no_comma"]
    columns = {"instruction_ids": [names], "arguments": [[{"language": "de"}, {}]], "prompt": [""]}
    found = scores.instructions([""], ["a, b"], **columns)
    assert found == {"reward": [0.0], "instructions": [0.0]}
    columns = {"instruction_ids": [names[:1]], "arguments": [[{"language": "de"}]], "prompt": [""]}
    assert scores.instructions([""], ["ein Text"], **columns)["reward"] == [None]
