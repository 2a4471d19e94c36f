"""Which metrics share a panel, and their curves."""

from dgrpo.trainer.report.panels import ceiling, panels, points, smooth


def test_panels_are_the_known_ones_then_groups_then_the_rest():
    names = [
        "zeta",
        "time/step",
        "time/train",
        "reward/format",
        "reward",
        "evaluation/length_x",
        "loss",
    ]
    assert [(p.title, [label for _, label in p.lines]) for p in panels(names)] == [
        ("reward", ["reward"]),
        ("loss", ["loss"]),
        ("held-out: length x", ["length x"]),
        ("parts of the reward", ["format"]),
        ("seconds", ["step", "train"]),
        ("zeta", ["zeta"]),
    ]


def test_smoothing():
    assert points([1, 2, 3], [None, 5.0, 6.0]) == ([2, 3], [5.0, 6.0])
    assert smooth([float(i) for i in range(39)]) is None and smooth([1.0] * 100) is None
    mean = smooth([float(i) for i in range(100)])
    assert mean[50] == 50 and mean[0] == 1.0 and len(mean) == 100
    assert smooth([float(i) for i in range(100)], top=10.0)[50:] == [10.0] * 50


def test_a_long_evaluation_does_not_flatten_the_times():
    names = [p.lines for p in panels(["time/step", "time/evaluation", "time/train"])]
    assert names == [
        (("time/evaluation", "time/evaluation"),),
        (("time/step", "step"), ("time/train", "train")),
    ]
    slow = [1.0, 1.0, 1.0, 1.0, 60.0, 1.0, 1.0, 1.0]
    assert ceiling("time/step", slow) == 2.5 and ceiling("time/step", [1.0, 2.0, 3.0, 4.0]) is None
    assert ceiling("loss", slow) is None and ceiling("time/evaluation", slow) is None
