"""The file of metrics is cut back whole."""

import json

import pytest

from dgrpo.trainer.metrics.lines import cut


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_cutting_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        cut(path, 1)
    assert lines(path) == [{"step": 1}, {"step": 2}]
    assert cut(path, 1) == 1 and lines(path) == [{"step": 1}]
    assert cut(tmp_path / "absent", 1) == 0
