"""A run that is gone on with on other data: it raises, or reads them from their beginning."""

import pytest

from dgrpo.trainer import train
from tests.trainer.home import make_home, settings  # noqa: F401
from tests.trainer.test_folder import changed


def test_other_data_are_read_from_their_beginning_where_that_is_allowed(home, tmp_path):
    wanted = settings(home, tmp_path / "run", "sft", steps=2)
    train(wanted)
    rows = (home / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(rows[:9]))
    other = settings(
        home,
        tmp_path / "run",
        "sft",
        steps=4,
        data={"sources": [{"path": str(tmp_path / "other.jsonl")}]},
    )
    with pytest.raises(ValueError, match="data.sources.0.path"):
        train(other)
    assert train(other, allow_changes=True).step == 4
    (tmp_path / "other.jsonl").write_text("".join(rows[:7]))  # the same file, other rows
    longer = changed(other, steps=5)
    with pytest.raises(ValueError, match="has 7 rows, had 9"):
        train(longer)
    assert train(longer, allow_changes=True).step == 5


def test_other_rows_in_the_same_file_are_not_gone_on_with(home, tmp_path):
    rows = (home / "rows.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "same.jsonl"
    file.write_text("".join(rows))
    data = {"sources": [{"path": str(file)}]}
    wanted = settings(home, tmp_path / "run", "sft", steps=2, data=data)
    train(wanted)
    file.write_text("".join(reversed(rows)))  # as many rows, and bytes
    longer = changed(wanted, steps=3)
    with pytest.raises(ValueError, match="other rows than when .* --allow-changes"):
        train(longer)
    assert train(longer, allow_changes=True).step == 3
    assert train(changed(wanted, steps=4)).step == 4  # the new rows are the run's own now
