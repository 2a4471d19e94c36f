"""Teacher contexts and gates on groups written by hand."""

import pytest

from dgrpo.trainer.attempts import Attempt, gate, teacher_context

TEMPLATE = "{prompt} | {context}"


def attempt(reward, tokens=1, completion="text", prompt="the long document. Who?", **row):
    return Attempt(
        prompt=prompt,
        completion=completion,
        row=row,
        tokens=tokens,
        reward=reward,
        correct=reward > 0.5,
        failed=row.pop("failed", False),
        truncated=False,
    )


def views(name, group):
    context = teacher_context(name, TEMPLATE)
    return [context(group, row) for row in range(len(group))]


def test_same_needs_no_hook():
    assert teacher_context("same", TEMPLATE) is None and gate("none") is None


def test_evidence_takes_the_place_of_the_document():
    row = {"document": "the long document.", "evidence": "document."}
    assert views("evidence", [attempt(0, **row)]) == [("document. Who?", 1.0)]
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "the long document. Who?"},
    ]
    ((prompt, weight),) = views("evidence", [attempt(0, prompt=chat, **row)])
    assert prompt == [chat[0], {"role": "user", "content": "document. Who?"}] and weight == 1.0


@pytest.mark.parametrize(
    "row",
    [{}, {"document": "the long document."}, {"document": "another", "evidence": "x"}],
    ids=["no document", "no evidence", "not in the prompt"],
)
def test_a_row_without_evidence_has_no_teacher(row):
    assert views("evidence", [attempt(0, **row)]) == [(None, 0.0)]


def test_passages_are_the_evidence_where_no_column_says():
    row = {"document": "the long document.", "passages": ["long", "document"]}
    assert views("evidence", [attempt(0, **row)]) == [("long\n\ndocument Who?", 1.0)]


def test_the_longest_wrong_rollout_sees_the_shortest_correct_one():
    group = [
        attempt(1.0, tokens=9, completion="long and right"),
        attempt(0.0, tokens=5),
        attempt(1.0, tokens=3, completion="right"),
        attempt(0.0, tokens=7),
        attempt(0.0, tokens=99, failed=True),
    ]
    seen = views("correct_rollout", group)
    assert seen[3] == ("the long document. Who? | right", pytest.approx(4 * 0.5 * 0.5))
    assert [view for i, view in enumerate(seen) if i != 3] == [(None, 0.0)] * 4


@pytest.mark.parametrize("rewards", [(1.0, 1.0), (0.0, 0.0)], ids=["all right", "all wrong"])
def test_a_group_of_one_kind_has_no_teacher(rewards):
    group = [attempt(reward) for reward in rewards]
    assert views("correct_rollout", group) == [(None, 0.0)] * 2


def test_privileged_text_else_the_answer():
    assert views("privileged", [attempt(0, privileged="P", answer="A")])[0][0].endswith("| P")
    assert views("privileged", [attempt(0, answer="A")])[0][0].endswith("| A")
    assert views("privileged", [attempt(0, answer=42)])[0][0].endswith("| 42")
    assert views("privileged", [attempt(0)]) == [(None, 0.0)]


def test_gates():
    group = [attempt(1.0), attempt(0.0), attempt(0.0), attempt(0.0)]
    assert gate("wrong")(group) == [0.0, 1.0, 1.0, 1.0]
    assert gate("mixed")(group) == pytest.approx([0.75] * 4)


def test_hooks_by_import_path():
    assert gate("math:sqrt")(4) == 2
    with pytest.raises(ValueError, match="method.gate: got 'sometimes', expected a known name"):
        gate("sometimes")
    with pytest.raises(ValueError, match="method.teacher_context: got 'math:none'"):
        teacher_context("math:none", TEMPLATE)
