"""The command line: help, overrides, errors, and each command on a tiny model."""

import json
from pathlib import Path

import pytest

from dgrpo.cli import main
from dgrpo.config import describe, load, parse_file
from tests.trainer_home import make_home, settings  # noqa: F401

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
        (["eval", "model"], "got no task, expected --ruler, --rows, --benchmark or"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_show_prints_the_settings(capsys):
    assert main(["train", str(EXAMPLES[0]), "--show", "seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_train_then_report_and_generate(home, tmp_path, capsys):
    from dgrpo.config import dump

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
