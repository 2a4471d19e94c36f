"""A small haystack of real text, and what the generators are made from."""

import email
from pathlib import Path

import pytest

from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.longblocks.tasks.corpus import build_corpus, counter
from dgrpo.longblocks.tasks.facts import Ground
from dgrpo.longblocks.tasks.tracing import code_files


@pytest.fixture(scope="session")
def haystack():
    """Some twenty files of Python, about 400 kB."""
    return str(Path(email.__file__).parent)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(1024, 0)


@pytest.fixture(scope="session")
def ground(tokenizer, haystack):
    corpus = build_corpus(tokenizer, haystack).part("train")
    return Ground(corpus, counter(tokenizer), code_files(corpus))
