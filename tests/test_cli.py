"""The command line: help, overrides, errors, and each command on a tiny model."""

import json
from pathlib import Path

import pytest

from dgrpo.cli import main
from dgrpo.trainer.config import describe, load, parse_file
from tests.trainer.home import make_home, settings  # noqa: F401

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_help_of_train_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    missing = [setting.name for setting in describe() if f"  {setting.name}  (" not in text]
    assert not missing and "self_distill: advantage=none" in text


@pytest.mark.parametrize("command", ["eval", "generate", "report"])
def test_help_of_the_others(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0 and f"dgrpo {command}" in capsys.readouterr().out


def test_data_make_is_handed_on(capsys):
    with pytest.raises(SystemExit) as done:
        main(["data", "make", "--help"])
    assert done.value.code == 0 and "--tasks" in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path):
    stages = load(path)
    assert all(stage.model.trust_remote_code is False for stage in stages.values())


def test_the_papers_example_has_its_published_values():
    path = ROOT / "examples/qwen3-1.7b-from-32b.yaml"
    sft, dgrpo = load(path).values()
    assert (sft.epochs, dgrpo.epochs) == (2, 1)
    assert (dgrpo.method.teacher_coef, dgrpo.method.clip_low, dgrpo.rollout.group_size) == (
        0.5,
        0.2,
        8,
    )
    assert [source["weight"] for source in parse_file(path)["data"]["sources"]] == [0.9, 0.1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "settings file: got 'nowhere.yaml'"),
        (["train", str(EXAMPLES[0]), "optimiser.lr=1"], "did you mean optimizer?"),
        (["train", str(EXAMPLES[0]), "--stage", "x"], "stage: got 'x'"),
        (["eval", "model"], "got nothing to score, expected files of rows, --tasks, --ruler,"),
        (["eval", "model", "--tasks", "relations", "--reward", "exact"], "no function 'exact'"),
        (["eval", "model", "x.jsonl", "--reward", "nowhere:f"], "importing nowhere failed: No mod"),
        (["eval", "model", "x.jsonl", "--reward", "no.py:f"], "importing no.py failed: "),
        (["eval", "model", "x.jsonl", "--against", "nowhere.json"], "nowhere.json"),
        (
            ["eval", "model", "--tasks", "variable_tracing", "--ruler", "all"],
            "--tasks: got variable_tracing, which --ruler has too; evaluate the two one by one",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_show_prints_the_settings(capsys):
    assert main(["train", str(EXAMPLES[0]), "--show", "seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_train_then_report_and_generate(home, tmp_path, capsys):
    from dgrpo.trainer.config import dump

    wanted = settings(home, tmp_path / "run", checkpoint={"every": 100, "export": True})
    (tmp_path / "run.yaml").write_text(dump(wanted))
    assert main(["train", str(tmp_path / "run.yaml"), "steps=2"]) == 0
    assert "finished at step 2" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/report.html").exists() and (tmp_path / "run/curves.png").exists()
    capsys.readouterr()
    command = ["generate", str(tmp_path / "run/export"), "?Sobek", "--n", "2", "--max-tokens", "4"]
    assert main([*command, "--temperature", "1"]) == 0
    text = capsys.readouterr().out
    assert text.count("---") == 2


def test_eval_scores_rows_and_compares(home, tmp_path, capsys):
    command = ["eval", str(home / "student"), "--rows", str(home / "rows.jsonl"), "--limit", "6"]
    command += ["--max-tokens", "4"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["items"]) == 6
    assert (tmp_path / "heatmap.png").exists()
    assert main([*command, "--against", str(tmp_path / "results.json")]) == 0
    assert "difference to" in capsys.readouterr().out
    assert main([*command[:2], "--benchmark", "gsm9k=x"]) == 2
    assert "--benchmark: got 'gsm9k=x'" in capsys.readouterr().err


def test_help_of_eval_names_its_tasks_as_data_make_does(capsys):
    from dgrpo.longblocks.evaluation import RULER_TASKS
    from dgrpo.longblocks.tasks.catalog import TASKS

    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    text = capsys.readouterr().out.replace(",", " ").split()
    assert not {"--tasks", "--ruler", *TASKS, *RULER_TASKS} - set(text)


def letters(prompts, completions, **columns):
    """A reward of this file."""
    return [min(1.0, len(text) / 4) for text in completions]


def words(prompts, completions, **columns):
    """Text in place of numbers."""
    return ["1.0" for _ in completions]


@pytest.fixture(name="plain")
def make_plain(home, tmp_path):
    """Rows without a reward and without an answer."""
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()[:4]]
    file = tmp_path / "plain.jsonl"
    file.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("order", ["files first", "options first"])
def test_eval_takes_files_and_a_reward(home, plain, tmp_path, capsys, order):
    files, reward = [plain, str(home / "rows.jsonl")], ["--reward", f"{__file__}:letters"]
    rest = [*files, *reward] if order == "files first" else [*reward, *files]
    options = ["--max-tokens", "4", "--limit", "3", "--out", str(tmp_path / "out")]
    assert main(["eval", str(home / "student"), *rest, *options]) == 0
    items = json.loads((tmp_path / "out/results.json").read_text())["items"]
    assert len(items) == 6 and all(
        item["score"] == min(1.0, len(item["completion"]) / 4) for item in items
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "4 rows, 4 no reward, the first: row 0: no reward (the row has no column reward, "),
        (["--reward", "exact_match"], "4 reward failed, the first: row 0: reward failed (ValueErr"),
        (["--reward", f"{__file__}:words"], "got the text '1.0', expected a number"),
        (["--limit", "0"], "nothing was scored of 0 rows"),
    ],
)
def test_eval_that_scores_nothing_fails(home, plain, options, message, capsys):
    command = ["eval", str(home / "student"), plain, "--max-tokens", "2", *options]
    assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: eval: nothing was scored of ") and message in error


def test_eval_of_an_empty_file_fails(home, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    command = ["eval", str(home / "student"), str(tmp_path / "empty.jsonl")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "nothing was scored of 0 rows" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/results.json").read_text())["items"] == []


def test_eval_makes_the_tasks_of_data_make(tmp_path, capsys, monkeypatch):
    from tests.longblocks.evaluation.test_ruler import Oracle

    monkeypatch.setattr("dgrpo.cli._generator", lambda options: Oracle())
    command = ["eval", "model", "--tasks", "relations,quoting", "--lengths", "4k", "--count", "2"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    items = json.loads((tmp_path / "results.json").read_text())["items"]
    assert sorted(item["task"] for item in items) == ["quoting"] * 2 + ["relations"] * 2


def test_eval_goes_on_after_a_line_that_cannot_be_read(home, tmp_path, capsys):
    lines = (home / "rows.jsonl").read_text().splitlines()[:2]
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[0], "{", lines[1]]))
    command = ["eval", str(home / "student"), str(tmp_path / "rows.jsonl"), "--max-tokens", "2"]
    assert main(command) == 0
    assert "without a score: 1 bad JSON" in capsys.readouterr().out
