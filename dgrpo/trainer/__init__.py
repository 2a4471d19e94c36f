"""The trainer: one loop for every method, on FSDP2-sharded Hugging Face models.

from dgrpo.trainer import train_stages
from dgrpo.trainer.config import load

train_stages(load("examples/qwen3-1.7b-from-32b.yaml"))
"""

from typing import TYPE_CHECKING, Any

from dgrpo.extras import require

if TYPE_CHECKING:
    from dgrpo.trainer.loop import Diverged, Outcome, RewardsFailed, finished, train, train_stages

__all__ = ["Diverged", "Outcome", "RewardsFailed", "finished", "train", "train_stages"]

require(__name__, "transformers", "datasets", "peft", "safetensors", "pydantic", "yaml", "numpy")


def __getattr__(name: str) -> Any:
    """Load the loop when one of its names is first used: the settings alone load fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dgrpo.trainer import loop

    return getattr(loop, name)
