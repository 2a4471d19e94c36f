"""Checkpoints a killed run continues from, and export to a Hugging Face folder.

Nothing here is pickled: tensors are safetensors, the rest JSON.
"""

from dgrpo.trainer.checkpoint.checkpointer import Checkpointer
from dgrpo.trainer.checkpoint.errors import CheckpointError
from dgrpo.trainer.checkpoint.export import export
from dgrpo.trainer.checkpoint.state import RunState

__all__ = ["CheckpointError", "Checkpointer", "RunState", "export"]
