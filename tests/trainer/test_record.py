"""When a run that learns nothing is told so."""

from dgrpo.trainer.record import standstill
from dgrpo.trainer.run import IN_A_ROW, Learned


def told(steps):
    """How many warnings each step of (loss, norm, lowest, highest) has."""
    seen = [Learned(*step) for step in steps]
    return [
        len([*standstill(seen[max(0, n - IN_A_ROW - 1) : n])]) for n in range(1, len(steps) + 1)
    ]


def test_each_stretch_is_told_once():
    equal, different = (0.1, 1.0, 0.5, 0.5), (0.1, 1.0, 0.0, 0.5)
    assert told([equal] * 6) == [0, 0, 1, 0, 0, 0]
    assert told([equal, equal, different, *[equal] * 3]) == [0, 0, 0, 0, 0, 1]


def test_another_constant_starts_again():
    one, other = (0.1, 1.0, 0.5, 0.5), (0.1, 1.0, 1.0, 1.0)
    assert told([one, one, other, other, other]) == [0, 0, 0, 0, 1]


def test_steps_without_rewards_are_not_equal():
    assert told([(0.1, 1.0, None, None)] * 4) == [0] * 4


def test_loss_and_gradient_must_both_be_zero():
    assert told([(0.0, 0.0, None, None)] * 4) == [0, 0, 1, 0]
    assert told([(0.0, 1e-9, None, None)] * 4) == [0] * 4
    assert told([(float("nan"), 0.0, None, None)] * 4) == [0] * 4
