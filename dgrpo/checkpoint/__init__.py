"""Checkpoints a killed run continues from, and export to a Hugging Face folder.

`Checkpointer` saves and restores model, optimiser, `RunState` and every rank's random numbers;
`export` writes what `from_pretrained` loads. Nothing here is pickled: tensors are safetensors, the
rest JSON.
"""

from dgrpo.checkpoint.checkpointer import Checkpointer
from dgrpo.checkpoint.errors import CheckpointError
from dgrpo.checkpoint.export import export
from dgrpo.checkpoint.state import RunState

__all__ = ["CheckpointError", "Checkpointer", "RunState", "export"]
