"""The trainer: one loop for every method, on FSDP2-sharded Hugging Face models.

from dgrpo.trainer import train_stages
from dgrpo.trainer.config import load

train_stages(load("examples/qwen3-1.7b-from-32b.yaml"))
"""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgrpo.trainer.loop import Diverged, Outcome, RewardsFailed, finished, train, train_stages

__all__ = ["Diverged", "Outcome", "RewardsFailed", "finished", "train", "train_stages"]

for _name in ("transformers", "peft", "pydantic", "datasets"):
    if importlib.util.find_spec(_name) is None:
        raise ImportError(
            f"dgrpo.trainer: got no {_name}, expected the extra `train`; pip install 'dgrpo[train]'"
        )


def __getattr__(name: str) -> Any:
    """The loop's names, loaded when first asked for: settings alone load in a moment."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dgrpo.trainer import loop

    return getattr(loop, name)
