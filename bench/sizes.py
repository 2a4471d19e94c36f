"""The models whose LM heads are measured, and the shapes that a student and a teacher make.

Widths and vocabularies (rows of the LM head, padding included) are those of the published
`config.json` files; Gemma-3's vocabulary is that of its multimodal checkpoints (4B, 12B, 27B).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


class Model(NamedTuple):
    """An LM head: its width and its number of rows."""

    hidden: int
    vocab: int


MODELS = {
    "qwen3-0.6b": Model(1024, 151936),
    "qwen3-1.7b": Model(2048, 151936),
    "qwen3-4b": Model(2560, 151936),
    "qwen3-8b": Model(4096, 151936),
    "qwen3-14b": Model(5120, 151936),
    "qwen3-32b": Model(5120, 151936),
    "qwen2.5-3b": Model(2048, 151936),
    "qwen2.5-7b": Model(3584, 152064),
    "qwen2.5-14b": Model(5120, 152064),
    "qwen2.5-32b": Model(5120, 152064),
    "llama-3.1-8b": Model(4096, 128256),
    "llama-3.1-70b": Model(8192, 128256),
    "gemma-3-4b": Model(2560, 262208),
    "gemma-3-12b": Model(3840, 262208),
    "gemma-3-27b": Model(5376, 262208),
}
PAIRS = {
    "qwen3": ("qwen3-1.7b", "qwen3-32b"),
    "qwen2.5": ("qwen2.5-7b", "qwen2.5-32b"),
    "llama-3.1": ("llama-3.1-8b", "llama-3.1-70b"),
    "gemma-3": ("gemma-3-4b", "gemma-3-27b"),
}


@dataclass(frozen=True)
class Shape:
    """What one step works on: N tokens, student and teacher width, vocabulary, inputs' dtype."""

    name: str
    tokens: int
    hidden: int
    teacher_hidden: int
    vocab: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return (
            f"{self.name}: N={self.tokens} Hs={self.hidden} Ht={self.teacher_hidden} "
            f"V={self.vocab} {self.dtype}"
        )

    def at(self, tokens: int) -> Shape:
        """The same heads with another number of tokens."""
        return replace(self, tokens=tokens)


def model(name: str) -> Model:
    """The LM head of a model by its name, in any case."""
    if name.lower() not in MODELS:
        raise ValueError(f"model: got {name!r}, expected one of {', '.join(MODELS)}")
    return MODELS[name.lower()]


def heads(student: str, teacher: str, tokens: int, *, divide: int = 1, dtype="bfloat16") -> Shape:
    """The shape that two models make; `divide` shrinks widths and vocabulary, and names it so."""
    ours, theirs = model(student), model(teacher)
    if ours.vocab != theirs.vocab:
        raise ValueError(
            f"teacher: got {teacher} with {theirs.vocab} rows in its head, expected the "
            f"{ours.vocab} of {student}; choose a teacher of the same family"
        )
    name = f"{student} <- {teacher}" + (f" /{divide}" if divide > 1 else "")
    widths = (ours.hidden // divide, theirs.hidden // divide, ours.vocab // divide)
    return Shape(name, tokens, *widths, dtype=dtype)


def pair(family: str, tokens: int, *, divide: int = 1, dtype: str = "bfloat16") -> Shape:
    """The shape of a family's student and teacher in `PAIRS`."""
    return heads(*PAIRS[family], tokens, divide=divide, dtype=dtype)
