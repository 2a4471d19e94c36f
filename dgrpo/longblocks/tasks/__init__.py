"""Long-context tasks made from any text, with answers that a reward can verify."""

from dgrpo.extras import require

require(__name__, "numpy", "transformers", "datasets")

from dgrpo.longblocks.tasks.tokenizer import train_tokenizer

__all__ = ["train_tokenizer"]
