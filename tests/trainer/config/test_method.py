"""Coefficients over the steps."""

import pytest

from dgrpo.trainer.config import Schedule


@pytest.mark.parametrize(
    ("shape", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)], ids=str
)
def test_schedule_of_a_coefficient(shape, middle):
    schedule = Schedule(start=1.0, end=0.0, shape=shape)
    end = 1.0 if shape == "constant" else 0.0
    values = [schedule.at(step, 5) for step in (0, 2, 4, 9)]
    assert values == pytest.approx([1.0, middle, end, end])


def test_a_schedule_has_steps_of_its_own():
    assert Schedule(start=0.0, end=3.0, steps=4).at(3, 100) == 3.0
