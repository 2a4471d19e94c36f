"""A Hugging Face folder out of a model on any number of ranks, one gathered tensor at a time."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dgrpo.trainer.checkpoint import files
from dgrpo.trainer.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from dgrpo.trainer.policy import PolicyModel


class _Shards:
    """Fills `model-00001-of-00003.safetensors`, …; holds one file's tensors in host memory."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.held: dict[str, torch.Tensor] = {}
        self.bytes, self.total = 0, 0
        self.written: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.bytes + size > self.limit:
            self.flush()
        self.held[name] = tensor.detach().to("cpu", copy=True)
        self.bytes += size
        self.total += size

    def flush(self) -> None:
        pieces = [(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in self.held.items()]
        part = self.folder / f"part-{len(self.written)}"
        files.write_tensors(part, pieces, {"format": "pt"})
        self.written.append(list(self.held))
        self.held, self.bytes = {}, 0

    def has(self, name: str) -> bool:
        return any(name in names for names in self.written)

    def finish(self) -> None:
        """The last file, the names with their count, and the index where there are several."""
        self.flush()
        count, places = len(self.written), {}
        for number, names in enumerate(self.written):
            final = "model.safetensors"
            if count > 1:
                final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self.folder / f"part-{number}", self.folder / final)
            places |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": places}
            files.write_json(self.folder / "model.safetensors.index.json", index)


def export(
    model: PolicyModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    merge: bool = True,
    shard_bytes: int = 5 * 2**30,
) -> Path:
    """Writes the folder that `AutoModelForCausalLM.from_pretrained` loads, on rank 0. Collective.

    The folder appears, or replaces the one before, once all of it is on the disk. An error on any
    rank raises CheckpointError on every rank.

    Args:
        model: sharded or not, with LoRA or without.
        folder: configuration, generation configuration, weights and tokenizer go here.
        tokenizer: saved beside the weights, if given.
        dtype: of the floating-point weights; None keeps that of the parameters.
        merge: with LoRA, merge it into the weights; False writes the adapter that
            `PeftModel.from_pretrained` puts on its base model.
        shard_bytes: largest size of a weight file, and the host memory that rank 0 needs.
    """
    from dgrpo.trainer.policy.fsdp import (
        full_tensors,  # imports transformers, which a Checkpointer does not need
    )

    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    adapter = not merge and model.model is not model.causal
    tensors = full_tensors(model, merge=not adapter, dtype=dtype)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    writes, error = ranks == 1 or dist.get_rank() == 0, None
    try:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            if adapter:
                _write_adapter(model, tensors, temporary)
            else:
                _write_model(model, tensors, temporary, dtype, shard_bytes)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    except Exception as caught:
        error = caught
    try:
        for (
            _
        ) in tensors:  # what is left: the other ranks' part in the collectives, or after an error
            pass
        if writes and error is None:
            files.replace_folder(temporary, folder)
    except Exception as caught:
        error = error or caught
    if writes:
        files.discard(temporary)
    texts = [error and f"{type(error).__name__}: {error}"]
    if ranks > 1:
        texts *= ranks
        dist.all_gather_object(texts, texts[0])
    if any(texts):
        raise CheckpointError(f"export to {folder}: {next(filter(None, texts))}") from error
    return folder


def _write_model(
    model: PolicyModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    shards = _Shards(folder, shard_bytes)
    for name, tensor in tensors:
        shards.add(name, tensor)
    shards.finish()
    causal = model.causal
    config = copy.deepcopy(causal.config)
    config.architectures = [type(causal).__name__]
    config.dtype = dtype or model.head.weight.dtype
    if model.tied and shards.has("lm_head.weight"):  # merging LoRA has untied it
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.save_pretrained(folder)
    if causal.generation_config is not None:
        causal.generation_config.save_pretrained(folder)


def _write_adapter(
    model: PolicyModel, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path
) -> None:
    from peft import get_peft_model_state_dict

    own = {name: tensor.cpu() for name, tensor in tensors if ".lora_" in name}
    own = get_peft_model_state_dict(model.model, state_dict=own, save_embedding_layers=False)
    pieces = [(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in own.items()]
    files.write_tensors(folder / "adapter_model.safetensors", pieces, {"format": "pt"})
    config = copy.copy(model.model.active_peft_config)
    config.inference_mode = True  # as peft saves it
    config.save_pretrained(folder)
