"""A small haystack of real text, and what the generators are made from."""

import email
from pathlib import Path

import pytest

from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.longblocks.tasks.corpus import build_corpus
from dgrpo.longblocks.tasks.facts import Ground


@pytest.fixture(scope="session")
def haystack():
    """Some twenty files of Python, about 400 kB."""
    return str(Path(email.__file__).parent)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(1024, 0)


@pytest.fixture(scope="session")
def ground(tokenizer, haystack):
    return Ground(build_corpus(tokenizer, haystack).part("train"), tokenizer)
