"""The haystack: text cut into units whose token counts add up."""

import numpy as np
import pytest

from dgrpo.longblocks.tasks.corpus import Corpus, build_corpus, unit_cuts, unit_tokens
from dgrpo.longblocks.tasks.haystack import read_text, text_files, texts
from dgrpo.text import BadRow, Report, count_tokens


@pytest.fixture(scope="module")
def corpus(tokenizer, haystack):
    return build_corpus(tokenizer, haystack)


def test_runs_of_units_have_the_tokens_that_they_say(corpus, tokenizer):
    rng = np.random.default_rng(0)
    for room in (200, 1500, 9000):
        first = int(rng.integers(len(corpus)))
        last = corpus.reach(first, room)
        counted = corpus.before(last) - corpus.before(first)
        real = count_tokens(tokenizer, corpus.text(first, last))
        assert abs(real - counted) <= 2 and room - 200 < counted <= room


def test_runs_longer_than_the_text_repeat_it(corpus):
    last = corpus.reach(5, 3 * corpus.tokens)
    assert last == 5 + 3 * len(corpus)
    assert corpus.text(5, last) == 3 * corpus.text(5, 5 + len(corpus))


def test_units_are_whole_lines_and_short(corpus):
    sizes = np.diff(corpus.starts)
    assert np.median(sizes) < 250 and sizes.max() < 3000
    assert all(corpus.text(i, i + 1).endswith("\n") for i in range(0, len(corpus), 7))


def test_splits_are_different_files(corpus, haystack):
    train, test = corpus.part("train"), corpus.part("test")
    names = [{name for name, _, _ in part.files} for part in (train, test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == len(corpus.files)
    assert train.tokens + test.tokens == corpus.tokens
    name, first, last = test.files[0]
    original = dict(texts(haystack))[name]
    assert test.text(first, last) == original.rstrip() + "\n\n"


def test_saved_and_mapped_it_is_the_same(corpus, tmp_path):
    corpus.save(tmp_path)
    again = Corpus.load(tmp_path)
    assert again.text(3, 50) == corpus.text(3, 50) and again.files == corpus.files
    assert np.array_equal(again.totals, corpus.totals) and again.border == corpus.border


@pytest.mark.parametrize("text", ["a\n", "x" * 9000, "word " * 3000 + "\n\n\nend", "é\n" * 400])
def test_cuts_cover_any_text(text, tokenizer):
    cuts = unit_cuts(text)
    assert cuts[0] == 0 and cuts[-1] == len(text) and cuts == sorted(set(cuts))
    assert max(np.diff(cuts)) <= 2000
    assert sum(unit_tokens(tokenizer, text, cuts)) == count_tokens(tokenizer, text)
    assert sum(unit_tokens("bytes", text, cuts)) == len(text.encode())


def test_unreadable_files_are_counted(tmp_path):
    (tmp_path / "good.txt").write_text("some text\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "binary.bin").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    report = Report(log=lambda line: None)
    assert [name for name, _ in texts(tmp_path, report)] == ["good.txt"]
    assert report.counts == {"unreadable file": 2, "not text": 1}
    with pytest.raises(BadRow, match="latin.txt: unreadable file"):
        read_text(tmp_path / "latin.txt")


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no readable text"):
        build_corpus("bytes", tmp_path)
    with pytest.raises(ValueError, match="expected a folder"):
        text_files(tmp_path / "none")


def test_the_standard_library_is_the_default():
    names = [path.name for path in text_files()]
    assert "argparse.py" in names and not any("site-packages" in str(p) for p in text_files())
