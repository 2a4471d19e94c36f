"""Runs that broke off are read as far as they go."""

import gzip

import pytest

from dgrpo.trainer.report import write_report
from dgrpo.trainer.report.read import read_lines, read_rollouts, read_run
from tests.trainer.report.runs import write_run


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="expected a run's folder: it, or a folder in it, has metrics"
    ):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="which is no folder"):
        write_report(tmp_path / "absent")


def test_lines_that_are_no_metrics_are_left_out(tmp_path):
    write_run(
        tmp_path, [1], tail='[1]\nnull\n\n{"no": "step"}\n{"step": 2, "loss": null, "name": "x"}\n'
    )
    (stage,) = read_run(tmp_path)
    assert stage.steps == [1, 2]
    assert stage.series == {"loss": [1.0, None], "reward": [0.1, None], "time/step": [2.0, None]}
    assert stage.notes == ["metrics.jsonl: 2 unreadable lines", "not finite: loss at step 2"]
    assert read_lines(b'{"a": 1}\n\xff\n') == ([{"a": 1}], 1)


def test_unreadable_rollouts_are_counted(tmp_path):
    path = tmp_path / "step-00000001-00000.jsonl.gz"
    path.write_bytes(b"no gzip")
    assert read_rollouts(path) == ([], 1)
    path.write_bytes(gzip.compress(b'{"step": 1}\n{"half'))
    assert read_rollouts(path) == ([], 2)
