"""Format and length."""

import pytest

from dgrpo.longblocks.rewards import format_regex, format_tags, length


def test_format_regex_is_about_the_whole_completion():
    pattern = r".*Answer: \d+"
    texts = ["So\nAnswer: 12", " Answer: 3 ", "Answer: 3 or so", "", "  "]
    assert format_regex([""] * 5, texts, pattern=pattern) == [1, 1, 0, 0, 0]
    assert format_regex([""], [" "], pattern=".*") == [0]


@pytest.mark.parametrize(
    "completion, good",
    [
        ("<think>a\nb</think>\n<answer>4</answer>", 1),
        ("<think>1 < 2</think><answer>x</answer>\n", 1),
        ("<answer>4</answer><think>a</think>", 0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0),
        ("<think><think>a</think></think><answer>4</answer>", 0),
        ("<think>a<answer>b</answer></think><answer>4</answer>", 0),
        ("Well <think>a</think><answer>4</answer>", 0),
        ("<think> </think><answer>4</answer>", 0),
        ("<think>a</think><answer>4", 0),
        ("", 0),
    ],
)
def test_format_tags(completion, good):
    assert format_tags([""], [completion]) == [good]


def test_length_is_the_soft_overlong_penalty_of_dapo():
    counts = [1, 80, 90, 95, 100, 200, 0]
    values = length([""] * 7, ["x"] * 6 + [""], completion_tokens=counts, max_tokens=100, cache=20)
    assert values == pytest.approx([1, 1, 0.5, 0.25, 0, 0, 0])
    assert length([""], [" \n"], completion_tokens=[2], max_tokens=9) == [0], "blank"
    assert length([""], ["a"], completion_tokens=[2], max_tokens=9, min_tokens=3) == [0]
    assert length(["", ""], ["a", "b"], completion_tokens=[9, 10], max_tokens=9) == [1, 0]
    with pytest.raises(TypeError, match="length: got no completion_tokens, max_tokens, expected"):
        length([""], ["a"], cache=1)
    with pytest.raises(ValueError, match="cache: got 10"):
        length([""], ["a"], completion_tokens=[2], max_tokens=9, cache=10)
