"""Coefficients and learning rates over the steps."""

import pytest

from dgrpo.trainer.config import Schedule
from dgrpo.trainer.schedule import coefficient, lr_factor


def test_a_number_does_not_move():
    assert coefficient(0.5, 7, 10) == 0.5


@pytest.mark.parametrize(
    ("shape", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)], ids=str
)
def test_schedule_of_a_coefficient(shape, middle):
    schedule = Schedule(start=1.0, end=0.0, shape=shape)
    end = 1.0 if shape == "constant" else 0.0
    values = [coefficient(schedule, step, 5) for step in (0, 2, 4, 9)]
    assert values == pytest.approx([1.0, middle, end, end])


def test_a_schedule_has_steps_of_its_own():
    assert coefficient(Schedule(start=0.0, end=3.0, steps=4), 3, 100) == 3.0


def factors(steps, **changes):
    options = {"warmup_steps": 0, "decay": "linear", "decay_fraction": 1.0, "final_fraction": 0.0}
    return [lr_factor(step, steps, **{**options, **changes}) for step in range(steps)]


def test_warm_up_then_constant():
    assert factors(4, warmup_steps=2, decay="constant") == [0.5, 1.0, 1.0, 1.0]


def test_decay_over_the_last_part():
    found = factors(10, decay_fraction=0.5, final_fraction=0.1)
    assert found[:5] == [1.0] * 5
    assert found[5:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def test_cosine_ends_at_its_fraction():
    found = factors(8, decay="cosine", final_fraction=0.25)
    assert found[-1] == pytest.approx(0.25) and found == sorted(found, reverse=True)


def test_without_an_end_there_is_no_decay():
    assert (
        lr_factor(50, None, warmup_steps=10, decay="linear", decay_fraction=1.0, final_fraction=0.0)
        == 1.0
    )
