"""Rollouts read back as they were, every token with its text."""

import gzip
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dgrpo.trainer.batch import Sample, Scored
from dgrpo.trainer.metrics import rollout_record, token_pieces, write_rollouts


def read_gz(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes with a few merges, so that most characters beyond ASCII take several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the answer is the one that the text gives, é ü 中文"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(0, 256), max_size=40))
def test_pieces_of_any_tokens_are_one_each(tokenizer, ids):
    """A model may sample bytes that are no text."""
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_belongs_to_the_token_that_completes_it(tokenizer):
    ids = tokenizer("a🙂b", add_special_tokens=False).input_ids
    pieces = token_pieces(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"] and pieces[-2] == "🙂"


def test_records_read_back(tokenizer, tmp_path):
    ids = tokenizer("the answer <eos>").input_ids
    n = len(ids)
    sample = Sample(
        torch.tensor(tokenizer("x" * 20_000).input_ids),
        torch.tensor(ids),
        group=1,
        scored=Scored(0.123456789, {"exact": 1.0}, failed=False),
    )
    values = {
        "advantage": torch.full((n,), -1.0),
        "divergence": torch.full((n,), 1 / 3),
        "clipped": torch.tensor([True] + [False] * (n - 1)),
        "ratio": torch.tensor([math.inf] + [1.0] * (n - 1)),
    }
    record = rollout_record(tokenizer, 3, sample, values)
    path = write_rollouts(tmp_path, 3, [record])
    assert path.name == "step-00000003-00000.jsonl.gz"
    (got,) = read_gz(path)
    assert got == record
    assert "".join(got["text"]) == "the answer <eos>" and got["tokens"] == ids
    assert got["prompt_tokens"] == 20_000 and "12,000 characters left out" in got["prompt"]
    assert (
        got["reward"] == 0.12346
        and got["advantage"] == [-1] * n
        and got["divergence"][0] == 0.33333
    )
    assert got["rewards"] == {"exact": 1} and got["finish_reason"] == "stop"
    assert got["clipped"][:2] == [1, 0] and got["ratio"][:2] == [None, 1]
    assert "entropy" not in got and "answer" not in got
    first = path.read_bytes()
    assert write_rollouts(tmp_path, 3, [record]).read_bytes() == first
    assert write_rollouts(tmp_path, 4, []) is None


def test_a_value_for_each_token_is_needed(tokenizer):
    with pytest.raises(
        ValueError, match="divergence: got 2 values, expected one for each of 1 tokens"
    ):
        sample = Sample(torch.tensor([1]), torch.tensor([5]))
        rollout_record(tokenizer, 1, sample, {"divergence": torch.ones(2)})
