"""Sharded training with FSDP2: what is sharded how, gradients, full tensors.

From the inside: activation checkpointing of each decoder layer, then `fully_shard` of each layer,
of an untied head, and of the whole `PolicyModel` (embedding, last norm, and the head where it is
tied or has LoRA), which is the root. Mixed precision never casts the inputs of a forward: it would
round the log-probabilities and weights of the loss to bf16, also inside dataclasses.

FSDP averages gradients over the mesh, so token weights are multiplied by its size.
Everything here also takes a model that is not sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from dgrpo.distributed import sum_shards
from dgrpo.trainer.policy import PolicyModel


def shard(
    model: PolicyModel,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
    cpu_offload: bool = False,
    checkpoint_activations: bool = False,
) -> PolicyModel:
    """Shard `model` over `mesh`, in place. Every rank holds the same full model on the CPU before.

    A model to be trained is loaded in fp32, so that its optimiser keeps fp32 master weights, and
    given `compute_dtype=torch.bfloat16` on GPUs. A frozen one is loaded in bf16 and needs none.

    Args:
        mesh: of one or two dimensions, see `dgrpo.distributed.make_mesh`.
        compute_dtype: of gathered parameters and activations; None = the parameters' own.
        reduce_dtype: in which gradients are summed over ranks; None = `compute_dtype`.
        cpu_offload: keep shards, gradients and optimiser state in host memory.
        checkpoint_activations: keep only each decoder layer's input and compute it again in
            backward.

    Raises:
        ValueError: `cpu_offload` without an accelerator, or a model that is sharded already.
    """
    if isinstance(model, FSDPModule):
        raise ValueError("model: got one that is sharded already, expected a full model")
    if cpu_offload and mesh.device_type == "cpu":
        raise ValueError(
            "cpu_offload: got True on a CPU mesh, expected False; torch needs a GPU for it"
        )
    reset_rotary(model)
    if checkpoint_activations:
        checkpoint_layers(model)
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()

    def wrap(module: nn.Module, reshards: bool) -> None:
        options = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
        fully_shard(module, reshard_after_forward=reshards, **options)
        model.sharded.append((module, reshards))

    for layer in model.layers:
        wrap(layer, True)
    # Backward starts with the head: what it gathered in forward stays. A frozen one has none.
    again = not any(parameter.requires_grad for parameter in model.parameters())
    if not model.tied and not model.adapted_head:
        wrap(model.head, again)
    wrap(model, again)
    index = torch.cuda.current_device() if mesh.device_type == "cuda" else None
    model.mesh_device = torch.device(mesh.device_type, index)
    for method in ("hidden_states", "next_logits"):
        register_fsdp_forward_method(model, method)
    return model


def checkpoint_layers(model: PolicyModel) -> None:
    """Recompute each decoder layer in backward, in place; FSDP's hooks stay outside it."""
    for layer in model.layers:
        layer.forward = MethodType(_recomputed, layer)


def _recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def reset_rotary(model: nn.Module) -> None:
    """Compute the buffers of rotary embeddings again, in fp32.

    They are not in checkpoints: `model.to(torch.bfloat16)` rounds them, `to_empty` leaves garbage,
    and the loss barely shows either.
    """
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__ and hasattr(module, "config"):
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                old = getattr(module, name)
                setattr(module, name, buffer.to("cpu" if old.is_meta else old.device))


def sync_gradients(model: nn.Module, last: bool, every_micro: bool = True) -> None:
    """Set, before a micro-batch's forward, whether its gradients are reduced over ranks.

    With `every_micro` they are reduce-scattered after each micro-batch (replicas of HSDP sum at the
    `last` of the optimiser step alone), else kept whole on every rank and reduced at the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or every_micro)
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)


def grad_norm(model: nn.Module) -> Tensor:
    """2-norm of all gradients, fp32 scalar, the same on all ranks. Collective if sharded."""
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads if g.numel()]
    total = torch.stack(norms).square().sum() if norms else torch.zeros(())
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    if mesh is not None:
        total = sum_shards(total.to(mesh.device_type), mesh)
    return total.sqrt()


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients to a norm of at most `max_norm`; returns the norm before. Collective.

    A norm that is not finite leaves the gradients as they are: the caller skips the step.
    """
    norm = grad_norm(model)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    scale = torch.where(torch.isfinite(norm), scale, 1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad = local(parameter.grad)
            grad.mul_(scale.to(grad.device, non_blocking=True))
    return norm


@torch.no_grad()
def full_tensors(
    model: PolicyModel, merge: bool = True, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Full parameters (and saved buffers) under Hugging Face's names, one at a time. Collective.

    Every rank must run through the whole iterator. A tied head comes once, as the embedding; one
    with LoRA comes as well, since merging unties it.

    Args:
        merge: add LoRA's products to the weights that they adapt and leave its own matrices out, as
            a sampler or `from_pretrained` wants it. False yields peft's own names and tensors.
        dtype: convert before gathering; None = as stored.

    Raises:
        ValueError: an adapter that is not LoRA on a linear layer.
    """
    for module in model.modules():  # the shards take the place of gathered parameters
        if isinstance(module, FSDPModule):
            module.reshard()
    root = model.causal if merge else model.model
    seen: set[int] = set()
    for name, value in root.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        owner, _, last = path.rpartition(".")
        adapted = merge and last == "base_layer"
        if (id(value) in seen and not adapted) or (merge and ".lora_" in f".{name}"):
            continue
        seen.add(id(value))
        if not adapted:
            yield name, _full(value, dtype)
            continue
        full = _full(value, None)
        if leaf == "weight":
            full = _merged(root.get_submodule(owner), full)
        yield f"{owner}.{leaf}", full.to(dtype or full.dtype)


def _merged(layer: nn.Module, weight: Tensor) -> Tensor:
    if type(layer).__name__ != "Linear" or getattr(layer, "lora_variant", None):
        raise ValueError(
            f"model: got an adapter on {type(layer).__name__}, expected plain LoRA on nn.Linear; "
            "merge=False gives the adapters as they are"
        )
    for adapter in layer.active_adapters:
        a = _full(layer.lora_A[adapter].weight, torch.float32)
        b = _full(layer.lora_B[adapter].weight, torch.float32)
        delta = (b @ a) * layer.scaling[adapter]
        weight = (weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)
    return weight


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device.type != tensor.device_mesh.device_type:  # offloaded to the host
        tensor = tensor.to(tensor.device_mesh.device_type)
    return tensor.full_tensor()
