"""A Hugging Face folder out of a model on any number of ranks, one gathered tensor at a time."""

from __future__ import annotations

import collections
import copy
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dgrpo.distributed import ranks
from dgrpo.trainer.checkpoint import files
from dgrpo.trainer.checkpoint.errors import together

if TYPE_CHECKING:
    from dgrpo.trainer.policy import PolicyModel


def export(
    model: PolicyModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    merge: bool = True,
) -> Path:
    """Writes the folder that `AutoModelForCausalLM.from_pretrained` loads, on rank 0. Collective.

    The folder appears, or replaces the one before, once all of it is on the disk. An error on any
    rank raises CheckpointError on every rank.

    Args:
        dtype: of the floating-point weights; None keeps that of the parameters.
        merge: with LoRA, merge it into the weights; False writes the adapter that
            `PeftModel.from_pretrained` puts on its base model.
    """
    # Imports transformers, which a Checkpointer does not need.
    from dgrpo.trainer.policy.fsdp import full_tensors

    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    adapter = not merge and model.model is not model.causal
    tensors = full_tensors(model, merge=not adapter, dtype=dtype)
    writes = ranks().first

    def write() -> None:
        try:
            if writes:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                if adapter:
                    own = {name: tensor.cpu() for name, tensor in tensors if ".lora_" in name}
                    options = {"state_dict": own, "save_embedding_layers": False}
                    model.model.save_pretrained(temporary, **options)
                    (temporary / "README.md").unlink(missing_ok=True)  # peft's unfilled model card
                else:
                    _write_model(model, tensors, temporary, dtype)
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
        finally:  # every rank takes part in gathering each tensor, also after an error on rank 0
            collections.deque(tensors, maxlen=0)
        if writes:
            files.replace_folder(temporary, folder)

    try:
        together(ranks(), f"export to {folder}", write)
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_model(
    model: PolicyModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    places = _write_weights(tensors, folder)
    causal = model.causal
    config = copy.deepcopy(causal.config)
    config.architectures = [type(causal).__name__]
    config.dtype = dtype or model.head.weight.dtype
    if model.tied and "lm_head.weight" in places:  # merging LoRA has untied it
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.save_pretrained(folder)
    if causal.generation_config is not None:
        causal.generation_config.save_pretrained(folder)


def _write_weights(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> dict[str, str]:
    """Write `model-00001-of-00003.safetensors`, …, and their index; the file of each tensor."""
    written, total = [], 0
    for held in files.in_parts(tensors):
        files.write_tensors(folder / f"part-{len(written)}", held, {"format": "pt"})
        written.append(list(held))
        total += sum(tensor.nbytes for tensor in held.values())
    count, places = len(written), {}
    for number, names in enumerate(written):
        final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        final = final if count > 1 else "model.safetensors"
        os.rename(folder / f"part-{number}", folder / final)
        places |= dict.fromkeys(names, final)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        files.write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
    return places
