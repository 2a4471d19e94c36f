"""Hugging Face models from a folder, the hub or a configuration, with LoRA and Liger's layers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel


def from_pretrained(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    lora: Any = None,
    liger: bool = False,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A causal language model on the CPU, from safetensors alone: nothing is unpickled.

    `dtype` is fp32 to train (master weights), bf16 for a frozen model; `lora` a `peft.LoraConfig`,
    None to train all parameters; `kwargs` are for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: weights that do not fit the folder's `config.json`; transformers alone would
            fill in random ones.
    """
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(_no_table)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
    finally:
        log.removeFilter(_no_table)
    _check_weights(info)
    if more := sorted(info["unexpected_keys"]):
        log.warning("%s: %d weights that the model lacks: %s", path, len(more), ", ".join(more[:5]))
    return _adapted(model, lora, liger)


def _no_table(record: logging.LogRecord) -> bool:
    """Drop transformers' table of weights that do not fit: `from_pretrained` says it in a line."""
    return "LOAD REPORT" not in record.getMessage()


def from_config(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    lora: Any = None,
    liger: bool = False,
) -> nn.Module:
    """A model with random weights."""
    return _adapted(AutoModelForCausalLM.from_config(config, dtype=dtype), lora, liger)


def apply_liger(model: PreTrainedModel) -> None:
    """Replace the layers that Liger-Kernel has for this kind of model, in place; no losses.

    Raises:
        ValueError: no GPU, or a kind of model that Liger-Kernel does not know.
    """
    if not torch.cuda.is_available():
        raise ValueError("liger: got True without a GPU, expected False; it runs on GPUs only")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    kind = model.config.model_type
    if kind not in known:
        raise ValueError(
            f"liger: got a model of type {kind!r}, expected one of {sorted(known)}; set liger=False"
        )
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def _check_weights(info: dict[str, Any]) -> None:
    """Raise ValueError where weights are missing or have another shape than the parameters."""
    problems = [
        f"{name} has shape {list(found)}, by its config.json {list(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ] or [f"its weights lack {name}" for name in sorted(info["missing_keys"])]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"{problems[0]}{more}; expected the weights and the config.json of one model"
        )


def _adapted(model: PreTrainedModel, lora: Any, liger: bool) -> nn.Module:
    if liger:
        apply_liger(model)
    if lora is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, lora)
