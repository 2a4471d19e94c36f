"""What a run does when there is nothing to learn: rewards that fail or never differ, no teacher."""

import json
import multiprocessing
import os
import re
import socket
from pathlib import Path

import pytest

from dgrpo.cli import main
from dgrpo.trainer import RewardsFailed, train
from dgrpo.trainer.build import build
from dgrpo.trainer.checkpoint import Checkpointer
from dgrpo.trainer.config import dump
from tests.trainer.home import make_home, metrics, settings  # noqa: F401

HERE = __file__
RANKS = 2


def broken(prompts, completions, **columns):
    """Never gives a score."""
    raise RuntimeError("no judge\nto be found")


def constant(prompts, completions, **columns):
    """Tells nothing apart."""
    return [0.25] * len(completions)


CALLS = []


def now_and_then(prompts, completions, **columns):
    """Fails on two batches of three, counted by what it is called with."""
    if len(completions) > 1:
        CALLS.append(len(completions))
    if len(CALLS) % 3:
        raise RuntimeError("not now")
    return [float(len(text) % 3) for text in completions]


def broken_on_one_rank(prompts, completions, **columns):
    """Fails on rank 1."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("not here")
    return [float(len(text) % 3) for text in completions]


def paths(*names, **changes):
    """The group `rewards` with functions of this file."""
    return {"functions": [{"path": f"{HERE}:{name}"} for name in names], "timeout": None, **changes}


# -- rewards that fail -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["grpo", "dgrpo"])
def test_a_reward_that_always_fails_ends_the_run_with_its_state_saved(home, tmp_path, preset):
    wanted = settings(home, tmp_path, preset, steps=9, rewards=paths("broken"))
    with pytest.raises(RewardsFailed) as raised:
        train(wanted)
    message = str(raised.value)
    assert re.fullmatch(
        r"rewards: every sample failed in 3 batches in a row \(rewards.max_failed\), last error: "
        r"reward broken: RuntimeError: no judge to be found \(test_rewards.py:\d+\); "
        r"checkpoint: step 3 in .*; fix the reward and start the same command again",
        message,
    )
    assert [line["reward_failed"] for line in metrics(tmp_path)] == [1, 1, 1]
    assert Checkpointer(tmp_path / "checkpoints").steps() == [3]
    assert train(settings(home, tmp_path, preset, steps=5)).step == 5


def test_it_ends_a_run_that_goes_on_as_well(home, tmp_path):
    train(settings(home, tmp_path, "grpo", steps=2))
    changed = {"rewards": paths("broken", max_failed=2), "batch": {"updates": 2}}
    with pytest.raises(RewardsFailed, match="every sample failed in 2 batches in a row"):
        train(settings(home, tmp_path, "grpo", steps=20, **changed))
    assert Checkpointer(tmp_path / "checkpoints").steps()[-1] == 5  # 2, one batch of 2, half of one
    assert train(settings(home, tmp_path, "grpo", steps=7, batch={"updates": 2})).step == 7


def test_a_batch_with_a_score_starts_the_count_again(home, tmp_path):
    CALLS.clear()
    assert train(settings(home, tmp_path, "grpo", steps=7, rewards=paths("now_and_then"))).step == 7
    assert [line["reward_failed"] for line in metrics(tmp_path)] == [1, 1, 0, 1, 1, 0, 1]


def test_one_of_two_rewards_is_enough(home, tmp_path):
    wanted = settings(home, tmp_path, "grpo", steps=9, rewards=paths("constant", "broken"))
    with pytest.raises(RewardsFailed, match="last error: reward broken: "):
        train(wanted)


def test_no_reward_at_all_is_no_failure(home, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"?{name}"}) + "\n" for name in "abcdefgh"))
    data = {"sources": [{"path": str(rows)}]}
    rewards = {"functions": [], "max_failed": 1}
    assert train(settings(home, tmp_path / "run", "opd", data=data, rewards=rewards)).step == 2


def test_the_command_line_says_so_in_a_line_and_exits_with_1(home, tmp_path, capsys):
    fatal = str(Path(HERE).parents[1] / "longblocks" / "rewards" / "samples.py") + ":fatal"
    rewards = {"functions": [{"path": fatal}], "timeout": 20.0, "max_failed": 1}
    wanted = settings(home, tmp_path / "run", "grpo", rewards=rewards, rollout={"group_size": 2})
    (tmp_path / "run.yaml").write_text(dump(wanted))
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: rewards: every sample failed in 1 batch (rewards.max_failed)")
    assert "reward fatal: worker ended with exit code 7" in error
    assert not (tmp_path / "run/done.yaml").exists()


def test_a_failing_reward_of_the_evaluation_is_told(home, tmp_path, capsys):
    held_out = {"sources": [{"path": str(home / "rows.jsonl")}], "count": 4}
    train(settings(home, tmp_path, "sft", rewards=paths("broken"), evaluate=held_out))
    told = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    assert len(told) == 2 and "no held-out completion has a reward, last error" in told[0]
    assert "reward broken: RuntimeError" in told[0]


def one_rank(rank, port, wanted, out):
    """What torchrun starts: the first run is to be ended on both ranks, the second on none."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for number, one in enumerate(wanted):
        try:
            text = f"step {train(one).step}"
        except RewardsFailed as error:
            text = str(error)
        (out / f"{number}-{rank}.txt").write_text(text)


def test_all_ranks_end_together_and_none_for_itself(home, tmp_path):
    uneven = {"prompts": 3, "tokens": 64}
    wanted = [
        settings(home, tmp_path / name, "grpo", steps=5, batch=uneven, rewards=paths(name))
        for name in ("broken", "broken_on_one_rank")
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    group = [
        context.Process(target=one_rank, args=(rank, port, wanted, tmp_path))
        for rank in range(RANKS)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(200)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in group] == [0] * RANKS
    said = [[(tmp_path / f"{n}-{r}.txt").read_text() for r in range(RANKS)] for n in range(2)]
    wanted = "every sample failed in 3 batches in a row"
    assert all(wanted in text and "step 3" in text for text in said[0])
    assert said[1] == ["step 5", "step 5"]


# -- nothing to learn from ---------------------------------------------------------------------


def warned(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]


def test_equal_rewards_and_a_loss_of_zero_are_told_once(home, tmp_path, capsys):
    train(settings(home, tmp_path, "grpo", steps=8, rewards=paths("constant")))
    equal, still = warned(capsys)
    assert "step 3: warning: every reward of 3 steps in a row is 0.25" in equal
    assert "step 3: warning: loss and gradient are exactly 0 in 3 steps in a row" in still


def test_a_run_that_learns_is_told_nothing(home, tmp_path, capsys):
    train(settings(home, tmp_path, "dgrpo", steps=4))
    assert warned(capsys) == []
    train(settings(home, tmp_path / "teacher", "dgrpo", steps=4, rewards=paths("constant")))
    assert len(warned(capsys)) == 1  # the teacher still teaches


@pytest.mark.parametrize(
    ("preset", "rows", "message"),
    [
        ("opsdl", {"answer": "A"}, "no row has the column document"),
        ("opsdl", {"document": "D"}, "no row has the column evidence or passages"),
        ("opsdl", {"document": "", "evidence": "E"}, "no row has the column document"),
        ("opsdl", {"document": "D", "evidence": "E"}, "with the document as a part of its prompt"),
        ("self_distill", {"document": "D"}, "no row has the column privileged or answer"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_teacher_without_its_columns_is_refused(
    home, tmp_path, preset, rows, message, streaming, capsys
):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"?{n}", **rows}) + "\n" for n in range(8)))
    data = {"sources": [{"path": str(file), "streaming": streaming}]}
    wanted = settings(home, tmp_path / "run", preset, data=data)
    (tmp_path / "run.yaml").write_text(dump(wanted))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    name = {"opsdl": "evidence", "self_distill": "privileged"}[preset]
    assert error.startswith(f"error: method.teacher_context: got {name!r}, but ")
    assert message in error
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_one_row_with_the_columns_is_enough_and_none_is_skipped(home, tmp_path, streaming):
    rows = [{"prompt": f"?{n}", "id": str(n)} for n in range(8)]
    rows[5] |= {"document": "?5", "evidence": "5"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(file), "streaming": streaming}
    wanted = settings(home, tmp_path, "opsdl", data={"sources": [source], "shuffle": False})
    run = build(wanted)
    assert [prompt.id for prompt in run.stream.batch(8)] == [row["id"] for row in rows]
    run.close()
