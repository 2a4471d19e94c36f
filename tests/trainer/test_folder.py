"""A run's folder: one run at a time, and the settings of what trained in it stay."""

import json
import multiprocessing
import os
import shutil
import socket

import pytest

from dgrpo.cli import main
from dgrpo.trainer import finished, train, train_stages
from dgrpo.trainer.build import build
from dgrpo.trainer.config import dump, load, validate
from dgrpo.trainer.folder import FolderInUse, FolderLock
from tests.trainer.home import make_home, metrics, settings  # noqa: F401


def kept(folder):
    """The settings of each stretch, in order."""
    return [load(path)[""] for path in sorted((folder / "history").iterdir())]


def changed(wanted, **values):
    """Settings with some of their values, "group__name" or "name", replaced."""
    tree = wanted.model_dump()
    for name, value in values.items():
        *groups, last = name.split("__")
        inner = tree
        for group in groups:
            inner = inner[group]
        inner[last] = value
    return validate(tree)


def listing(folder):
    """Every file with its content, but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


# -- the lock ----------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_touches_nothing(home, tmp_path, capsys):
    wanted = settings(home, tmp_path / "run", "sft")
    train(wanted)
    before, lock = listing(tmp_path / "run"), FolderLock(tmp_path / "run")
    more = changed(wanted, steps=3)
    with pytest.raises(FolderInUse, match=f"another run is under way .* pid {os.getpid()}"):
        train(more)
    (tmp_path / "run.yaml").write_text(dump(more))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"error: out: got '{tmp_path / 'run'}', in which")
    assert listing(tmp_path / "run") == before
    lock.release()
    assert train(more).step == 3


def test_a_run_that_fails_lets_go_of_its_folder(home, tmp_path):
    wanted = settings(home, tmp_path, "sft")
    with pytest.raises(ValueError, match=r"model\.name"):
        train(changed(wanted, model__name=str(tmp_path / "no" / "model" / "here")))
    run = build(wanted)
    with pytest.raises(FolderInUse):
        build(wanted)
    run.close()
    train(wanted)


def test_a_stage_in_use_is_refused(home, tmp_path):
    stages = {name: settings(home, tmp_path / name, "sft") for name in ("one", "two")}
    lock = FolderLock(tmp_path / "two")
    with pytest.raises(FolderInUse, match="two"):
        train_stages(stages)
    lock.release()
    outcomes = train_stages(stages)
    assert [outcome.status for outcome in outcomes.values()] == ["already done", "finished"]


def one_rank(rank, port, file, out):
    """What torchrun starts."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for text in ("run.lock", "lr"):  # held; then trained with another method
        code = main(["train", str(file / f"{text}.yaml")])
        (out / f"{text}-{rank}.txt").write_text(str(code))


def test_all_ranks_end_where_the_folder_is_refused(home, tmp_path):
    held = settings(home, tmp_path / "held", "sft")
    done = settings(home, tmp_path / "done", "sft")
    train(done)
    (tmp_path / "run.lock.yaml").write_text(dump(held))
    (tmp_path / "lr.yaml").write_text(dump(changed(done, seed=3, steps=4)))
    lock = FolderLock(tmp_path / "held")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dgrpo.trainer"])
    group = [
        context.Process(target=one_rank, args=(rank, port, tmp_path, tmp_path)) for rank in (0, 1)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
        alive = process.is_alive()
        process.kill()
        assert not alive
    lock.release()
    codes = [(tmp_path / f"{t}-{r}.txt").read_text() for t in ("run.lock", "lr") for r in (0, 1)]
    assert codes == ["2"] * 4


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method__clip_low": 0.3}, "method.clip_low: 0.2 -> 0.3"),
        ({"teacher__temperature": 2.0}, "teacher.temperature: 1.0 -> 2.0"),
        ({"data__shuffle": False}, "data.shuffle: True -> False"),
        ({"model__lora": {"rank": 2}}, "model.lora: None -> "),
        ({"seed": 5, "steps": 9}, "seed: 0 -> 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_finished_folder_is_not_relabelled(home, tmp_path, changes, told):
    wanted = settings(home, tmp_path)
    train(wanted)
    before = listing(tmp_path)
    with pytest.raises(
        ValueError, match="which holds 2 steps trained with other settings"
    ) as error:
        train(changed(wanted, **changes))
    assert told in str(error.value) and "--allow-changes" in str(error.value)
    assert listing(tmp_path) == before


def test_a_source_that_changed_is_named_by_its_place(home, tmp_path):
    shutil.copy(home / "rows.jsonl", tmp_path / "other.jsonl")
    source = {"path": str(home / "rows.jsonl")}
    wanted = settings(home, tmp_path / "run", "sft", data={"sources": [source, source]})
    train(wanted)
    other = [source, {"path": str(tmp_path / "other.jsonl")}]
    with pytest.raises(ValueError, match=r"settings: data\.sources\.1\.path: \S+ -> \S+other"):
        train(settings(home, tmp_path / "run", "sft", data={"sources": other}))
    with pytest.raises(ValueError, match=r"settings: data\.sources: \[.* -> \[.*; expected the"):
        train(settings(home, tmp_path / "run", "sft", data={"sources": [source]}))
    kwargs = [source, {**source, "options": {"a": [1, 2]}}]
    with pytest.raises(ValueError, match=r"data\.sources\.1\.options\.a: None -> \[1, 2\]"):
        train(settings(home, tmp_path / "run", "sft", data={"sources": kwargs}))


def test_harmless_changes_go_on_and_every_stretch_keeps_its_own(home, tmp_path, capsys):
    first = settings(home, tmp_path, "sft")
    second = changed(first, steps=4, log__samples=0, checkpoint__every=1, optimizer__lr=0.05)
    assert train(first)[:2] == ("finished", 2) and finished(first)
    assert train(second)[:2] == ("finished", 4) and finished(second)
    text = capsys.readouterr().out
    for change in ("steps: 2 -> 4", "checkpoint.every: 100 -> 1", "optimizer.lr: 0.1 -> 0.05"):
        assert f"changed since the last start: {change}" in text
    assert [load(tmp_path / name)[""] for name in ("settings.yaml", "done.yaml")] == [second] * 2
    assert kept(tmp_path) == [first, second]
    names = sorted(path.name for path in (tmp_path / "history").iterdir())
    assert [name.partition("-from-")[2] for name in names] == [
        "step-00000000.yaml",
        "step-00000002.yaml",
    ]


def test_settings_that_trained_nothing_are_not_kept(home, tmp_path):
    first = settings(home, tmp_path, "sft")
    train(first)
    before = listing(tmp_path)
    for wanted in (changed(first, optimizer__lr=0.5), changed(first, steps=1)):
        assert train(wanted)[:2] == ("already done", 2)
        assert listing(tmp_path) == before
    run = build(changed(first, steps=9))  # a start that is killed before its first step
    run.close()
    assert listing(tmp_path) == before
    assert train_stages({"a": changed(first, steps=1)})["a"][:2] == ("already done", 2)
    assert train_stages({"a": first})["a"][:2] == ("already done", 2)
    assert listing(tmp_path) == before


def test_allowed_changes_go_on_and_are_kept(home, tmp_path, capsys):
    first = settings(home, tmp_path, "grpo")
    second = settings(home, tmp_path, "dgrpo", steps=3)
    train(first)
    (tmp_path / "run.yaml").write_text(dump(second))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "method.preset: grpo -> dgrpo" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run.yaml"), "--allow-changes"]) == 0
    assert kept(tmp_path) == [first, second]
    assert [("divergence" in line) for line in metrics(tmp_path)] == [False, False, True]


def test_stages_are_compared_before_the_first_is_trained(home, tmp_path):
    stages = {name: settings(home, tmp_path / name, "sft") for name in ("one", "two")}
    train(stages["two"])
    stages["two"] = changed(stages["two"], method__objective="grpo")
    with pytest.raises(ValueError, match="two.*--allow-changes"):
        train_stages(stages)
    assert not (tmp_path / "one").exists()


def test_what_a_stage_does_not_use_may_change(home, tmp_path):
    first = settings(home, tmp_path, "sft")
    train(first)
    train(changed(first, teacher__name="another", steps=3))
    assert len(metrics(tmp_path)) == 3


def test_a_folder_in_which_nothing_was_trained_takes_any_settings(home, tmp_path):
    held_out = {"sources": [{"path": str(home / "rows.jsonl")}], "count": 3}
    first = settings(home, tmp_path, "grpo", evaluate=held_out)
    train(first)
    # As if the first start had ended after the scores before the first step.
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**json.loads(line), "mark": 1}) + "\n")
    for name in ("checkpoints", "history", "rollouts"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "done.yaml").unlink()
    second = settings(home, tmp_path, "sft", model={"name": str(home / "teacher")})
    second = changed(second, evaluate__sources=first.evaluate.model_dump()["sources"])
    train(second)
    assert load(tmp_path / "settings.yaml")[""] == second
    assert "mark" not in metrics(tmp_path)[0] and metrics(tmp_path)[0]["step"] == 0


def test_settings_of_another_version_name_their_file(home, tmp_path):
    wanted = settings(home, tmp_path, "sft")
    (tmp_path / "settings.yaml").write_text(dump(wanted) + "speed: 3\n")
    with pytest.raises(ValueError, match=r"out: \S+settings.yaml cannot be read.*\nspeed: unknown"):
        train(wanted)


def test_an_end_that_was_interrupted_is_made_up_for(home, tmp_path):
    wanted = settings(home, tmp_path, "sft", checkpoint={"export": True})
    train(wanted)
    (tmp_path / "done.yaml").unlink()
    shutil.rmtree(tmp_path / "export")
    assert train(wanted)[:2] == ("finished", 2)
    assert finished(wanted) and (tmp_path / "export/model.safetensors").exists()


def test_an_export_can_be_asked_for_afterwards(home, tmp_path):
    wanted = settings(home, tmp_path, "sft")
    train(wanted)
    assert train(changed(wanted, checkpoint__export=True)).status == "already done"
    assert (tmp_path / "export/model.safetensors").exists()
    assert load(tmp_path / "settings.yaml")[""] == wanted


def test_a_run_that_until_ended_goes_on_without_it(home, tmp_path):
    until = {"metric": "loss", "above": -100.0, "min_steps": 3}
    wanted = settings(home, tmp_path, "sft", steps=10, until=until)
    assert train(wanted).step == 3
    assert train(wanted).step == 3
    assert train(changed(wanted, until=None, steps=5)).step == 5
