"""The command line `dgrpo data make`."""

import pytest

from dgrpo.data import load_rows
from dgrpo.longblocks.tasks.command import length, main


def test_lengths_in_words():
    assert [length(t) for t in ("4096", "32k", "1M", "1.5k")] == [4096, 32768, 1 << 20, 1536]
    with pytest.raises(ValueError, match="32k or 1M"):
        length("long")


def test_the_command_line(tmp_path, haystack, capsys):
    out = tmp_path / "out"
    options = "--tasks relations --count 2 --tokens 6k --processes 1"
    wanted = [str(out), *options.split()]
    assert main([*wanted, "--haystack", haystack]) == 0
    assert len(load_rows(out)) == 2
    with pytest.raises(SystemExit):
        main([*wanted, "--tasks", "riddles"])
    assert "riddles" in capsys.readouterr().err
