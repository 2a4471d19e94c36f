"""Tokenizers: one that is loaded, or a small one trained on local text, for small models."""

from functools import lru_cache

import numpy as np

from dgrpo.longblocks.tasks.haystack import source_lines

END, PAD = "<|end|>", "<|pad|>"


def load_tokenizer(name: str):
    """The tokenizer of a folder or of the hub; `"bytes"` stays."""
    if name == "bytes":
        return name
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


@lru_cache
def invented_names(n: int) -> tuple[str, ...]:
    """`n` distinct invented names such as `Lerax`; the first ones of a fixed sequence."""
    if n > 20_000:
        raise ValueError(f"names: got {n}, expected at most 20000")
    rng = np.random.default_rng(20605)
    found: dict[str, None] = {}
    while len(found) < n:
        first, second = rng.choice(list("BDFGKLMNPRSTVZ"), 2)
        vowels, last = rng.choice(list("aeiou"), 2), rng.choice(list("gkqvxz"))
        found[f"{first}{vowels[0]}{second.lower()}{vowels[1]}{last}"] = None
    return tuple(found)


def train_tokenizer(vocab_size: int = 512, names: int = 64):
    """Train a byte-level BPE tokenizer on a sample (1 MB) of the standard library's sources.

    Digits and line ends are tokens of their own, so that lines can be tokenised one by one and put
    together in any order. The last tenth of the lines is held out.

    Args:
        vocab_size: size of the vocabulary with the 256 bytes and 2 special tokens, without names.
        names: this many of `invented_names` become tokens of their own.

    Returns:
        PreTrainedTokenizerFast with `eos_token` and `pad_token`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 258:
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least 258 (bytes, 2 special)")
    lines = source_lines()
    lines = lines[: len(lines) * 9 // 10]
    chosen = np.random.default_rng(0).permutation(len(lines))[:30_000]
    backend = Tokenizer(models.BPE())
    alone = pre_tokenizers.Split(Regex(r"\n|\d"), behavior="isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([alone, words])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((lines[i] + "\n" for i in sorted(chosen)), trainer)
    backend.add_tokens([AddedToken(n, normalized=False) for n in invented_names(names)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
