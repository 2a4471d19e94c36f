"""How models transform their logits, and LoRA on the head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dgrpo.head import FusedHead, transformed


class LoraHead(FusedHead):
    """A loss head inside peft's LoRA layer: its logits are those of `W + s B A`.

    All parameters keep their names; autograd splits the gradient of the merged weight among them.
    """

    layer: tuple[nn.Module]  # peft's; in a tuple, as a submodule would make a cycle

    def merged_weight(self) -> Tensor:
        """(V, H) `W + s B A` over the active adapters, in the dtype of `W`."""
        (layer,) = self.layer
        weight = self.weight
        if not layer.disable_adapters:
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        return weight


def head_of(causal: PreTrainedModel) -> nn.Linear:
    """The linear head of a causal model, below LoRA where the head has it.

    Raises:
        TypeError: the output embedding is neither.
    """
    head = causal.get_output_embeddings()
    if isinstance(head, nn.Module) and hasattr(head, "lora_A"):
        head = head.base_layer
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"model: got the output embedding {type(head).__name__}, expected nn.Linear or LoRA "
            "around it; name the head in LoraConfig.target_modules, not in modules_to_save"
        )
    return head


def install_head(causal: PreTrainedModel) -> None:
    """Put a `FusedHead` (or `LoraHead`) in the place of the head, sharing its parameters."""
    linear, holder = head_of(causal), causal.get_output_embeddings()
    transform = logit_transform(causal)
    if holder is linear:
        causal.set_output_embeddings(FusedHead.from_linear(linear, *transform))
    else:
        holder.base_layer = LoraHead.from_linear(linear, *transform)
        holder.base_layer.layer = (holder,)


def logit_transform(causal: PreTrainedModel) -> tuple[float, float | None]:
    """The (scale, soft cap) that a model applies to its logits, from its configuration.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma-2 and -3 cap at
    `final_logit_softcapping`. To check that, the model's own forward runs on given logits in place
    of its head's, without its body, which costs nothing.

    Raises:
        ValueError: the model's forward changes logits in another way.
    """
    config, linear = causal.config.get_text_config(), head_of(causal)
    multiplier = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale, softcap = multiplier / divisor, getattr(config, "final_logit_softcapping", None)
    device = linear.weight.device
    shape = (1, 2, linear.out_features)
    given = torch.linspace(-80, 80, 2 * linear.out_features, device=device).reshape(shape)
    states = _Given(last_hidden_state=torch.zeros(1, 2, linear.in_features, device=device))
    head, body = causal.get_output_embeddings(), causal.base_model
    with torch.no_grad(), _replaced(head, given.clone()), _replaced(body, states):
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
        got = causal(input_ids=tokens, use_cache=False).logits.float()
    want = transformed(given, scale, softcap)
    if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"model: {type(causal).__name__} changes its logits in a way that logit_scale, "
            "logits_scaling and final_logit_softcapping of its configuration do not explain; the "
            "fused head would train on other logits"
        )
    return scale, softcap


class _Given(BaseModelOutputWithPast):
    """The output of a body; every other field that a model may ask for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


@contextlib.contextmanager
def _replaced(module: nn.Module, result: object) -> Iterator[None]:
    """Within the context, the module returns `result`."""
    before = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: result
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
