"""Long-context tasks made from any text, with answers that a reward can verify."""

from dgrpo.longblocks.tasks.tokenizer import train_tokenizer

__all__ = ["train_tokenizer"]
