"""Hugging Face models from a folder, the hub or a configuration, with LoRA and Liger's layers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


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
    with _report_last():
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
        _check_weights(info)
    return _adapted(model, lora, liger)


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
    """Replace RMSNorm, the gated MLP and RoPE by Liger-Kernel's, in place; its losses stay off.

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
    known[kind](model=model, **liger_options(inspect.signature(known[kind]).parameters))


def liger_options(parameters: Iterable[str]) -> dict[str, bool]:
    """Switches of one of Liger's functions with these parameters: layers on, losses off."""
    layers = {"rope", "rms_norm", "swiglu", "geglu"}
    losses = {"cross_entropy", "fused_linear_cross_entropy"}
    return {name: name in layers for name in parameters if name in layers | losses}


@contextmanager
def _report_last() -> Iterator[None]:
    """Hold back transformers' table of odd weights until the end; drop it where an error is raised.

    The error says in one line what the table would say before it.
    """
    logger, held = logging.getLogger("transformers.modeling_utils"), []

    def hold(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return True
        held.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
    for record in held:
        logger.handle(record)


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
