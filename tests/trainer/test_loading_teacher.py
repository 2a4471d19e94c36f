"""A teacher with another tokenizer is refused, whatever the sizes of the heads."""

import json
import re
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgrpo.trainer import train
from dgrpo.trainer.build import build
from dgrpo.trainer.loading import check_same_ids, common_vocab
from tests.trainer.home import make_home, metrics, settings  # noqa: F401


class Tokenizer:
    def __init__(self, *tokens, **changed):
        self.vocab = {token: i for i, token in enumerate(tokens)} | changed

    def get_vocab(self):
        return self.vocab


def test_heads_are_compared_in_their_common_columns():
    assert common_vocab(151936, 152064) == common_vocab(152064, 151936) == 151936
    same = Tokenizer("a", "b", "c")
    assert common_vocab(4, 6, same) == 4
    check_same_ids(same, Tokenizer("a", "b", "c"))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (Tokenizer("a", "b", "c", b=5), "id 1 is no token, expected 'b'; id 5 is 'b', expected no"),
        (Tokenizer("a", "b", "c", "d"), "id 3 is 'd', expected no token; "),
        (Tokenizer("a", "c", "b"), "id 1 is 'c', expected 'b'; id 2 is 'b', expected 'c'; "),
        (Tokenizer("a", "b", "c", d=1), "id 1 is 'b' or 'd', expected 'b'; "),
        (Tokenizer(*"ABCDE"), "id 2 is 'C', expected 'c' (and 2 more ids); distributions"),
    ],
)
def test_tokenizers_that_differ_raise_with_the_first_ids(theirs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_same_ids(Tokenizer("a", "b", "c"), theirs)


def test_a_head_smaller_than_the_tokenizer_raises():
    with pytest.raises(ValueError, match="expected at least the 3 ids"):
        common_vocab(2, 8, Tokenizer("a", "b", "c"))


# -- in a run ------------------------------------------------------------------------------------


@pytest.fixture
def taught(home, tmp_path):
    """Settings of a run whose teacher, of the student's very sizes, has a changed tokenizer."""

    def make(change, **teacher):
        shutil.copytree(home / "student", tmp_path / "other")
        change(tmp_path / "other")
        chosen = {"name": str(tmp_path / "other"), **teacher}
        return settings(home, tmp_path / "run", teacher=chosen)

    return make


def edit(name, change):
    """Change one JSON file of a folder in place."""

    def edited(folder):
        tree = json.loads((folder / name).read_text())
        change(tree)
        (folder / name).write_text(json.dumps(tree))

    return edited


def swap(tree):
    vocab = tree["model"]["vocab"]
    vocab["q"], vocab["z"] = vocab["z"], vocab["q"]


def add_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|more|>"]})
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("tokenizer.json", swap), "is 'q', expected 'z'"),
        (add_token, "is '<|more|>', expected no token"),
    ],
    ids=["two tokens swapped", "a special token more"],
)
@pytest.mark.parametrize("teacher", [{}, {"vocab_size": 300}], ids=["", "columns given"])
def test_another_tokenizer_is_refused(taught, change, message, teacher):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build(taught(change, **teacher))
    assert "teacher.allow_other_tokenizer=true" in str(error.value)


def test_another_special_token_is_refused(home, taught, tmp_path):
    """Of the same id and the same sizes, in both files that name it."""

    def change(folder):
        for path in folder.glob("tokenizer*.json"):
            path.write_text(path.read_text().replace("<|pad|>", "<|other|>"))

    with pytest.raises(ValueError, match=r"is '<\|other\|>', expected '<\|pad\|>'"):
        build(taught(change))


def test_the_setting_lets_another_tokenizer_pass(taught, tmp_path):
    train(taught(edit("tokenizer.json", swap), allow_other_tokenizer=True))
    assert metrics(tmp_path / "run")[0]["divergence"] >= 0


def test_a_tokenizer_of_its_own_setting_is_compared(home, taught, tmp_path):
    def drop(folder):
        for path in folder.glob("tokenizer*.json"):
            path.unlink()

    wanted = taught(drop, tokenizer=str(home / "teacher"))
    build(wanted).close()
    alone = settings(home, tmp_path / "run", teacher={"name": str(tmp_path / "other")})
    with pytest.raises(ValueError, match=r"teacher\.name: .* no tokenizer files"):
        build(alone)


def test_the_same_ids_with_another_end_or_another_split_are_warned_of(taught, caplog):
    def change(folder):
        edit("tokenizer_config.json", lambda tree: tree.update(eos_token="<|pad|>"))(folder)
        edit("tokenizer.json", lambda tree: tree.update(normalizer={"type": "Lowercase"}))(folder)

    build(taught(change)).close()
    assert "ends a text with '<|pad|>', the student's with '<|end|>'" in caplog.text
    assert "splits texts in another way" in caplog.text


@pytest.mark.parametrize("name", ["folder", "alias"])
def test_a_served_teacher_is_compared_where_its_tokenizer_is_at_hand(
    home, taught, tmp_path, name, caplog
):
    changed = taught(edit("tokenizer.json", swap))
    name = changed.teacher.name if name == "folder" else "teacher"
    served = {"name": name, "url": "http://localhost:9"}
    method = {"preset": "opd", "teacher": "served"}
    wanted = settings(home, tmp_path / "run", method=method, teacher=served)
    if name == "teacher":
        build(wanted).close()
        assert "its ids are not compared with the student's; set teacher.tokenizer" in caplog.text
        served["tokenizer"] = changed.teacher.name
        wanted = settings(home, tmp_path / "run", method=method, teacher=served)
    with pytest.raises(ValueError, match="got another tokenizer than the student's"):
        build(wanted)
