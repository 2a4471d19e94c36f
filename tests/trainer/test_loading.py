"""Models and tokenizers that cannot be loaded, or that are not of one kind, say so in one line."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from dgrpo.trainer.build import build
from tests.trainer.home import make_home, metrics, settings  # noqa: F401


@pytest.fixture
def copied(home, tmp_path):
    """Copies the student or the teacher; the copy may be changed."""

    def copy(of="student", name="copy"):
        shutil.copytree(home / of, tmp_path / name)
        return tmp_path / name

    return copy


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# -- files that are not whole, or of another model -----------------------------------------------


def halved(name):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def without_norm(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def deeper(folder):
    kinds = ["full_attention"] * 3
    change(folder / "config.json", num_hidden_layers=3, layer_types=kinds)


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGES = {
    "half the weights": (halved("model.safetensors"), "model.safetensors is not whole"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "model.safetensors is not whole: 0 bytes",
    ),
    "half the config": (halved("config.json"), "config.json is not whole: "),
    "another width": (
        lambda folder: change(folder / "config.json", hidden_size=64),
        "], by its config.json [",
    ),
    "a tensor fewer": (without_norm, "its weights lack model.norm.weight; "),
    "a layer more in the config": (deeper, "(and 10 more)"),
    "no tokenizer": (without_tokenizer, "it has no tokenizer files (tokenizer.json)"),
    "half the tokenizer": (halved("tokenizer.json"), "tokenizer.json is not whole: "),
    "a tokenizer's settings alone": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "it has no tokenizer files (tokenizer.json)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("role", ["model", "teacher"])
def test_what_cannot_be_loaded_is_one_line_with_its_file(home, tmp_path, copied, role, name):
    damage, message = DAMAGES[name]
    folder = copied("student" if role == "model" else "teacher")
    damage(folder)
    wanted = settings(home, tmp_path / "run", **{role: {"name": str(folder)}})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build(wanted)
    text = str(error.value)
    assert text.startswith(f"{role}.name: got {str(folder)!r}") and "\n" not in text


# -- a tokenizer without an end token --------------------------------------------------------------


def test_no_end_of_sequence_token_is_warned_of(home, tmp_path, copied, caplog):
    folder = copied()
    change(folder / "tokenizer_config.json", eos_token=None)
    build(settings(home, tmp_path / "run", model={"name": str(folder)}, teacher={})).close()
    assert f"got {str(folder)!r}, which has no end-of-sequence token" in caplog.text
