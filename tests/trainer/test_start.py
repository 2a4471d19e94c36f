"""What a run says while it starts, and what ends it: steps before epochs, to the true end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgrpo.cli import main
from dgrpo.trainer import train
from dgrpo.trainer.build import build
from dgrpo.trainer.config import dump
from tests.trainer.home import COUNT, make_home, metrics, settings  # noqa: F401

ROOT = Path(__file__).parents[2]
LONG = " x" * 300  # beyond the model's context


@pytest.fixture
def rows(home, tmp_path):
    """The path of rows of which those of some numbers are too long to be used."""

    def write(name, *bad):
        found = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
        for number in bad:
            found[number]["prompt"] = LONG
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        return {"path": str(path)}

    return write


def shown(text):
    """The "step i/n" of each line of a run without a terminal."""
    return [line.split()[1] for line in text.splitlines() if line.startswith("step ")]


# -- what ends a run ---------------------------------------------------------------------------


def test_explicit_steps_win_over_epochs_and_the_rows_come_round_again(home, tmp_path, capsys):
    out = train(settings(home, tmp_path, "sft", steps=9, epochs=1))  # 24 rows are 6 steps
    assert out[:2] == ("finished", 9) and len(metrics(tmp_path)) == 9
    text = capsys.readouterr().out
    assert shown(text)[-1] == "9/9"
    assert "steps: 9 (steps), 1.5 passes over the rows\n" in text


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("updates", [1, 3])
def test_the_display_counts_to_the_end_that_dropped_rows_leave(
    home, tmp_path, rows, epochs, updates, capsys
):
    data = {"sources": [rows("bad", 0, 3, 5, 11, 17)]}
    batch = {"prompts": 7, "updates": updates}
    groups = {"steps": None, "epochs": epochs, "data": data, "batch": batch}
    wanted = settings(home, tmp_path / "run", "sft", **groups)
    step = train(wanted).step
    usable = (COUNT - 5) * epochs
    assert step == usable // 7 * updates + min(usable % 7, updates)
    text = capsys.readouterr().out
    assert shown(text) == [f"{i}/{step}" for i in range(1, step + 1)]
    passes = "1 pass" if epochs == 1 else "2 passes"
    assert f"steps: {step}, {passes} over the rows (epochs)\n" in text
    assert "bad.jsonl, 5 dropped: 5 beyond the model's context\n" in text
    assert text.count("\n  beyond the model's context: ") == 3  # of which the first are shown


def test_the_display_counts_to_the_end_of_a_mix(home, tmp_path, rows, capsys):
    sources = [rows("a", 1, 2), {**rows("b", 4), "weight": 0.3}, {**rows("c"), "weight": 0.4}]
    wanted = settings(
        home, tmp_path / "run", "sft", steps=None, epochs=1, data={"sources": sources}
    )
    step = train(wanted).step
    assert shown(capsys.readouterr().out)[-1] == f"{step}/{step}"


def test_the_display_of_a_resumed_run_counts_to_the_same_end(home, tmp_path, rows, capsys):
    groups = {"data": {"sources": [rows("bad", 3, 8)]}, "epochs": 2, "steps": None}
    whole = train(settings(home, tmp_path / "whole", "sft", **groups)).step
    until = {"metric": "loss", "above": -100.0, "min_steps": 4}
    assert train(settings(home, tmp_path / "run", "sft", until=until, **groups)).step == 4
    capsys.readouterr()
    wanted = settings(home, tmp_path / "run", "sft", **groups)
    assert train(wanted).step == whole == 11
    text = capsys.readouterr().out
    assert "steps: 11, 2 passes over the rows (epochs); 4 of them are done\n" in text
    assert shown(text)[0] == "5/11" and shown(text)[-1] == "11/11"


def test_an_end_that_is_estimated_is_counted_to_as_the_rows_are_read(
    home, tmp_path, rows, monkeypatch, capsys
):
    """Too many rows to read at the start: here only some are."""
    from dgrpo.data.prompts import Survey

    def some(stream, seconds):
        found = Survey(stream.cursors[0].size)
        for index in range(6):
            found.add(stream._prepare(0, *stream.cursors[0].at(index), found.report))
        return [found]

    monkeypatch.setattr("dgrpo.data.PromptStream.survey", some)
    data = {"sources": [rows("bad", 0, 1, 2, 9)]}
    wanted = settings(home, tmp_path / "run", "sft", steps=None, epochs=2, data=data)
    step = train(wanted).step
    text = capsys.readouterr().out
    assert step == 10 and "steps: about 6, 2 passes" in text  # half of those read are dropped
    assert "bad.jsonl, 3 dropped of 6 read: 3 beyond" in text
    assert shown(text)[-1] == "10/10"


def test_until_and_streamed_rows_are_told(home, tmp_path, rows, capsys):
    data = {"sources": [{**rows("a"), "streaming": True}]}
    until = {"metric": "loss", "above": -100.0, "min_steps": 3}
    wanted = settings(home, tmp_path / "run", "sft", steps=None, epochs=2, until=until, data=data)
    assert train(wanted).step == 3
    text = capsys.readouterr().out
    assert (
        "steps: as many as 2 passes over the streamed rows give; earlier once the mean of loss "
        "is -100 or more (until)\n"
    ) in text
    assert shown(text) == ["1", "2", "3"]


# -- what the start says -----------------------------------------------------------------------


def test_the_start_says_each_stage_and_what_it_will_do(home, tmp_path, capsys):
    wanted = settings(home, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(dump(wanted))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    student, teacher = (
        sum(t.numel() for t in torch.nn.Module.parameters(model))
        for model in (build_model(home / "student"), build_model(home / "teacher"))
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[:12] == [
        f"train: dgrpo, in {tmp_path / 'run'}",
        "loading torch and transformers",
        f"model: loading {home / 'student'} (float32, cpu)",
        f"model: {student:,} parameters, all trained",
        f"teacher: loading {home / 'teacher'}",
        "data: reading rows",
        "method: dgrpo",
        f"teacher: {home / 'teacher'}, {teacher:,} parameters, none trained",
        f"data: 24 rows of {home / 'rows.jsonl'}, none dropped",
        "steps: 2 (steps), 0.3 passes over the rows",
        "each step: 4 prompts x 4 completions of up to 6 tokens, at most about 160 tokens",
        f"results: {tmp_path / 'run'}",
    ]
    assert lines[12].startswith("step 1/2")


def build_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def test_the_start_tells_adapters_and_other_teachers(home, tmp_path, capsys):
    model = {"name": str(home / "student"), "lora": {"rank": 2}}
    run = build(settings(home, tmp_path / "a", "sft", model=model, batch={"prompts": 3}))
    run.close()
    text = capsys.readouterr().out
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert f" parameters, {trained:,} trained\n" in text
    assert "each step: 3 prompts with their completions, about " in text
    run = build(settings(home, tmp_path / "b", "self_distill"))
    run.close()
    assert "teacher: the policy itself, shown privileged\n" in capsys.readouterr().out


def test_the_first_line_comes_before_torch(tmp_path):
    """Importing it takes seconds; a run must not be silent for so long."""
    (tmp_path / "run.yaml").write_text("model: {name: m}\ndata: {sources: [{path: rows.jsonl}]}\n")
    code = (
        "import sys, dgrpo.cli as cli\n"
        "def tell(text):\n"
        "    print(text, *({'torch', 'transformers', 'numpy', 'datasets'} & {*sys.modules}))\n"
        "    sys.exit()\n"
        "cli.say = tell\n"
        "cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "train", str(tmp_path / "run.yaml"), "method.preset=sft"]
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=path)
    assert found.stdout == "train: sft, in runs/dgrpo\n"
