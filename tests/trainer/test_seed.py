"""The seed fixes what Python's and NumPy's generators give, in this process and in the worker."""

import random

import numpy
import pytest
import torch

from dgrpo.trainer import train
from tests.trainer.home import make_home, metrics, settings  # noqa: F401


def dice(prompts, completions, **columns):
    """A reward of both global generators; imports NumPy when called, as a user may."""
    import random

    import numpy

    return [random.random() + numpy.random.rand() for _ in completions]


def shuffled(path):
    """Rows in an order that Python's generator gives."""
    import json

    with open(path) as file:
        rows = [json.loads(line) for line in file]
    random.shuffle(rows)
    return rows


@pytest.fixture(params=[None, 20.0], ids=["this process", "worker"])
def diced(home, tmp_path, request):
    """Trains with the dice, in a folder by its name, after other random numbers were drawn."""

    def run(name, steps, seed=0):
        for draw in range(len(name)):
            random.seed(draw), numpy.random.seed(draw), torch.manual_seed(draw)
        rewards = {"functions": [{"path": f"{__file__}:dice"}], "timeout": request.param}
        rows = {"path": f"{__name__}:shuffled", "options": {"path": str(home / "rows.jsonl")}}
        train(
            settings(
                home,
                tmp_path / name,
                steps=steps,
                seed=seed,
                rewards=rewards,
                data={"sources": [rows]},
                evaluate={"sources": [rows], "count": 2},
            )
        )
        return metrics(tmp_path / name)

    return run


def rewards(lines):
    return [line["reward"] for line in lines if "reward" in line]


def test_two_fresh_runs_are_equal(diced):
    first = diced("a", 2)
    assert diced("bbb", 2) == first
    assert rewards(diced("cc", 2, seed=1)) != rewards(first)
    assert len(set(rewards(first))) == 2  # each step has numbers of its own


def test_a_resumed_run_goes_on_with_the_same_numbers(diced):
    whole = diced("whole", 3)
    diced("parts", 1)  # its last evaluation draws too
    parts = diced("parts", 3)
    assert rewards(parts) == rewards(whole)
    assert parts[-1]["evaluation/reward"] == whole[-1]["evaluation/reward"]


def test_any_seed_is_taken(home, tmp_path):
    train(settings(home, tmp_path, "sft", steps=1, seed=2**40))
