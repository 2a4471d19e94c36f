"""Rows beyond the model's context are dropped with their place, never the end of a run."""

import json
import shutil

import pytest

from dgrpo.trainer import train
from dgrpo.trainer.build import build
from dgrpo.trainer.policy import PolicyModel
from tests.tiny import tiny_model
from tests.trainer.home import COUNT, make_home, metrics, settings  # noqa: F401

LONG = " x" * 300  # more than the context of 256


@pytest.fixture
def mixed(home, tmp_path):
    """The rows with one over-long prompt as line 4, and one over-long completion as line 9."""

    def write(*changes):
        rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
        for line, name in changes:
            rows[line - 1][name] = LONG
        path = tmp_path / "mixed.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"sources": [{"path": str(path)}]}

    return write


@pytest.mark.parametrize("preset", ["grpo", "sft"])
def test_an_over_long_prompt_is_dropped_with_its_place(
    home, tmp_path, mixed, preset, capsys, caplog
):
    data = mixed((4, "prompt"))
    out = train(settings(home, tmp_path / "run", preset, steps=None, epochs=1, data=data))
    assert out.step == -(-(COUNT - 1) // 4)
    assert "mixed.jsonl:4: beyond the model's context: " in caplog.text
    text = capsys.readouterr().out
    start, _, rest = text.partition("step 1/")
    assert "mixed.jsonl, 1 dropped: 1 beyond the model's context" in start
    assert "mixed.jsonl:4: 600 tokens of prompt + " in start
    assert "data: 23 rows kept, 1 dropped: 1 beyond the model's context" in rest


def test_a_prompt_must_leave_room_for_its_completion(home, tmp_path):
    """Only where it is sampled: a row's own answer does not count then."""

    def dropped(room):
        rollout = {"group_size": 2, "max_tokens": room}
        run = build(settings(home, tmp_path / str(room), "grpo", epochs=1, rollout=rollout))
        run.close()
        assert run.stream.report.dropped == run.stream.index == 0  # only looked at
        return run.stream.survey(9.0)[0].report.dropped

    assert dropped(256 - 16) == 0 and dropped(256 - 15) == COUNT  # every prompt has 16 tokens


@pytest.mark.parametrize("preset", ["sft", "kd"])
def test_a_given_row_counts_whole(home, tmp_path, mixed, preset, caplog):
    train(settings(home, tmp_path / "run", preset, data=mixed((9, "answer"), (9, "completion"))))
    run = build(settings(home, tmp_path / "b", preset, data=mixed((9, "completion"))))
    run.stream.batch(COUNT)
    assert run.stream.report.counts == {"beyond the model's context": 1}
    run.close()
    run = build(settings(home, tmp_path / "c", "grpo", data=mixed((9, "completion"))))
    run.stream.batch(COUNT)
    assert run.stream.report.dropped == 0
    run.close()


def test_an_over_long_evaluation_prompt_is_dropped(home, tmp_path, mixed, caplog):
    evaluate = {**mixed((2, "prompt")), "count": 5}
    train(settings(home, tmp_path / "run", evaluate=evaluate))
    assert "mixed.jsonl:2: beyond the model's context" in caplog.text
    assert "evaluation: 5 rows kept, 1 dropped: 1 beyond" in caplog.text
    lines = (tmp_path / "run/evaluation/step-00000000-00000.jsonl").read_text().splitlines()
    assert len(lines) == 5


def test_all_rows_over_long_is_an_error(home, tmp_path, mixed):
    data = mixed(*((line, "prompt") for line in range(1, COUNT + 1)))
    for name, epochs in (("a", 1), ("b", None)):
        with pytest.raises(
            ValueError, match=r"no usable row (.|\n)* 24 beyond the model's context"
        ):
            train(settings(home, tmp_path / name, "grpo", epochs=epochs, data=data))


def test_a_completion_as_long_as_the_context_is_an_error(home, tmp_path):
    with pytest.raises(
        ValueError, match=r"rollout\.max_tokens: got 256, expected less than the 256"
    ):
        build(settings(home, tmp_path, rollout={"max_tokens": 256}))
    evaluate = {"sources": [{"path": str(home / "rows.jsonl")}], "max_tokens": 300}
    with pytest.raises(ValueError, match=r"evaluate\.max_tokens: got 300, expected less than the"):
        build(settings(home, tmp_path, evaluate=evaluate))


def test_a_teacher_with_a_shorter_context_counts(home, tmp_path):
    shutil.copytree(home / "teacher", tmp_path / "short")
    path = tmp_path / "short/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 20}))
    with pytest.raises(ValueError, match=r"no usable row(.|\n)*at most 20 "):
        train(settings(home, tmp_path / "run", teacher={"name": str(tmp_path / "short")}))
    train(settings(home, tmp_path / "grpo", "grpo"))


def test_a_restart_drops_what_the_first_start_dropped(home, tmp_path, mixed):
    data = mixed((4, "prompt"), (11, "prompt"))
    for name, steps in (("whole", (5,)), ("parts", (2, 5))):
        for count in steps:
            train(settings(home, tmp_path / name, "grpo", steps=count, epochs=None, data=data))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_streamed_rows_are_dropped_too(home, tmp_path, mixed):
    data = mixed((4, "prompt"))
    data["sources"][0]["streaming"] = True
    run = build(settings(home, tmp_path / "run", "grpo", steps=None, epochs=1, data=data))
    assert len(run.stream.batch(COUNT)) == COUNT - 1
    run.close()


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}, 64),
        (
            {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            256,
        ),
        (
            {
                "max_position_embeddings": 256,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            256,
        ),
    ],
    ids=["as stated", "none", "linear", "yarn by hand", "yarn"],
)
def test_context_is_what_the_configuration_allows(changes, context):
    assert PolicyModel(tiny_model("llama", **changes)).context == context
    assert PolicyModel(tiny_model("gemma3", max_position_embeddings=64)).context == 64
