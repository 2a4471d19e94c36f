"""Tokenizers and weights from a folder or the hub; what is wrong with them is told in one line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoTokenizer

from dgrpo import distributed as ranks
from dgrpo.trainer.config import Model

log = logging.getLogger(__name__)

# Files that hold a tokenizer's vocabulary, in the layouts that transformers reads.
VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")


@contextmanager
def loading(setting: str, name: str) -> Iterator[None]:
    """ValueError of one line with the setting where what it names is not there or cannot be loaded.

    Wrap nothing in it but the reading of files: any exception counts as a fault of theirs.
    """
    path = Path(name)
    if (path.is_absolute() or len(path.parts) > 2) and not path.is_dir():
        raise ValueError(
            f"{setting}: got {name!r}, expected an existing folder or a hub name; "
            "the result of a stage is there once that stage has been run"
        )
    try:
        yield
    except Exception as error:  # each library that reads a file raises its own
        cause = damaged(path) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{setting}: got {name!r}, which cannot be loaded: {cause}") from error


def damaged(folder: Path) -> str | None:
    """The first file of a model's folder that ends too early or is something else; None if none."""
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                safe_open(path, framework="pt")
        except Exception as error:
            size = path.stat().st_size if path.exists() else 0
            return f"{path.name} is not whole: {size} bytes, {error}; copy or download it again"
    return None


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of `model.tokenizer`, else that of the model; warns if it has no end token."""
    if model.tokenizer is None:
        tokenizer = read_tokenizer(
            "model.name", model.name, model.revision, model.trust_remote_code
        )
    else:
        tokenizer = read_tokenizer(
            "model.tokenizer", model.tokenizer, None, model.trust_remote_code
        )
    if tokenizer.eos_token_id is None and ranks.rank() == 0:
        log.warning(
            "model.tokenizer: got %r, which has no end-of-sequence token: given completions are "
            "not ended, and sampled ones end where the model's eos_token_id or rollout.max_tokens "
            "says; set eos_token in its tokenizer_config.json",
            model.tokenizer or model.name,
        )
    return tokenizer


def read_tokenizer(setting: str, name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer in a folder or on the hub; ValueError that names `setting` if there is none.

    Without its files transformers makes one of the model's kind that knows no word.
    """
    missing = (
        "it has no tokenizer files (tokenizer.json); copy them there, or set "
        f"{setting.partition('.')[0]}.tokenizer"
    )
    with loading(setting, name):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            folder = Path(name)
            if folder.is_dir() and not any(any(folder.glob(p)) for p in VOCABULARIES):
                raise ValueError(missing) from error
            raise
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        if len(tokenizer.get_vocab().keys() - added) < 2:
            raise ValueError(missing)
    return tokenizer
