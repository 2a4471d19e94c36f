"""Fused loss heads for post-training language models on very long sequences.

`linear_dgrpo_loss` and its siblings compute GRPO, distillation and other objectives from hidden
states and LM-head weights; the `[tokens, vocabulary]` logits never exist.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgrpo.ops import (
        DgrpoOutput,
        LogprobsOutput,
        LossOutput,
        TeacherHead,
        TokenStats,
        TopKTeacher,
        linear_dgrpo_loss,
        linear_logprobs,
        linear_loss,
        linear_token_stats,
    )

__version__ = "0.1.0"

__all__ = [
    "DgrpoOutput",
    "LogprobsOutput",
    "LossOutput",
    "TeacherHead",
    "TokenStats",
    "TopKTeacher",
    "linear_dgrpo_loss",
    "linear_logprobs",
    "linear_loss",
    "linear_token_stats",
]


def __getattr__(name: str) -> Any:
    """Import the losses when one is asked for: importing torch takes seconds."""
    if not name.startswith("__"):
        ops = import_module("dgrpo.ops")  # makes dgrpo.ops, and what it imports, attributes too
        if name in __all__:
            return getattr(ops, name)
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
