"""The models of a run from its settings: where they lie, policy, teacher, reference, objective."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoConfig

from dgrpo import objectives
from dgrpo.distributed import ranks, start
from dgrpo.trainer.attempts import load_function
from dgrpo.trainer.config import Model, RunSettings
from dgrpo.trainer.config.settings import Teacher as TeacherSettings
from dgrpo.trainer.loading import loading
from dgrpo.trainer.policy import PolicyModel, fsdp, huggingface
from dgrpo.trainer.teachers import HttpTopK, SelfTeacher, ServedTeacher, Teacher
from dgrpo.trainer.vocabulary import common_vocab, teacher_tokenizer

OLD_FIELDS = ("rope_theta", "rope_local_base_freq")  # transformers makes rope_parameters of them


def place(settings: RunSettings) -> tuple[torch.device, Any]:
    """This rank's device, and the mesh to shard over; None for one process on a CPU."""
    cuda = settings.device != "cpu" and (settings.device == "cuda" or torch.cuda.is_available())
    if not cuda and "WORLD_SIZE" not in os.environ:
        return torch.device("cpu"), None
    device = start(settings.device, settings.fsdp.replicas)
    return device, ranks().mesh


def shard(model: PolicyModel, settings: RunSettings, mesh: Any, device: torch.device) -> Any:
    """The trained model on its device: masters in model.dtype, computing in fsdp.param_dtype."""
    if mesh is None:
        if settings.model.checkpointing:
            fsdp.checkpoint_layers(model)
        return model.to(device)
    compute = settings.fsdp.param_dtype or ("bfloat16" if device.type == "cuda" else None)
    return fsdp.shard(
        model,
        mesh,
        compute_dtype=getattr(torch, compute) if compute else None,
        reduce_dtype=getattr(torch, settings.fsdp.reduce_dtype),
        cpu_offload=settings.fsdp.offload,
        checkpoint_activations=settings.model.checkpointing,
    )


def frozen(
    group: Model | TeacherSettings, settings: RunSettings, mesh: Any, device: torch.device
) -> PolicyModel:
    """The model of `model` or `teacher`, only read: in teacher.dtype, sharded like the policy."""
    wanted = settings.teacher.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    with loading("model.name" if group is settings.model else "teacher.name", group.name):
        model = huggingface.from_pretrained(
            group.name,
            dtype=getattr(torch, wanted),
            revision=group.revision,
            trust_remote_code=group.trust_remote_code,
        )
    model = PolicyModel(model)
    model.requires_grad_(False).eval()
    return model.to(device) if mesh is None else fsdp.shard(model, mesh)


def load_policy(model: Model, seed: int = 0) -> PolicyModel:
    """The policy, not sharded yet; `seed` is that of random weights and adapters."""
    torch.manual_seed(seed)
    common = {
        "dtype": getattr(torch, model.dtype),
        "lora": lora_config(model),
        "liger": model.liger,
    }
    if model.name is not None:
        with loading("model.name", model.name):
            loaded = huggingface.from_pretrained(
                model.name,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                **common,
            )
        return PolicyModel(loaded)
    fields = dict(model.config or {})
    kind = fields.pop("model_type")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=3)
        raise ValueError(f"model.config.model_type: got {kind!r}, did you mean one of {near}?")
    known = {*dir(AutoConfig.for_model(kind)), *OLD_FIELDS}
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise ValueError(f"model.config.{key}: unknown to {kind}{hint}")
    return PolicyModel(huggingface.from_config(AutoConfig.for_model(kind, **fields), **common))


def lora_config(model: Model) -> LoraConfig | None:
    """peft's configuration of the adapters; None without."""
    if model.lora is None:
        return None
    targets = model.lora.targets
    if model.lora.head:
        targets = [*targets, "lm_head"]
    return LoraConfig(
        r=model.lora.rank,
        lora_alpha=model.lora.alpha,
        lora_dropout=model.lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def load_teacher(
    settings: RunSettings,
    model: PolicyModel,
    tokenizer: Any,
    mesh: Any,
    device: torch.device,
    options: dict[str, Any],
) -> Teacher | SelfTeacher | ServedTeacher | None:
    """The teacher of the method; notes in `options` how many columns the heads share."""
    method, wanted = settings.method, settings.teacher
    if not method.teaches():
        return None
    if method.teacher == "self":
        return SelfTeacher(model, offload_above=wanted.host_above)
    theirs = teacher_tokenizer(settings, tokenizer)
    if method.teacher == "served":
        source = HttpTopK(
            wanted.url, wanted.name, key_variable=wanted.key_variable, timeout=wanted.timeout
        )
        return ServedTeacher(source, wanted.top_k)
    teacher = frozen(wanted, settings, mesh, device)
    options["vocab_size"] = wanted.vocab_size
    if wanted.vocab_size is None and model.vocab_size != teacher.vocab_size:
        options["vocab_size"] = common_vocab(
            model.vocab_size, teacher.vocab_size, tokenizer, theirs
        )
    return Teacher(teacher, offload_above=wanted.host_above, offload_body=wanted.offload_body)


def load_reference(settings: RunSettings, mesh: Any, device: torch.device) -> PolicyModel | None:
    """The starting policy, frozen, where `ref_coef` asks for it."""
    if settings.method.ref_coef == 0.0:
        return None
    if settings.model.name is None:
        raise ValueError("method.ref_coef: got a value above 0 with random weights, expected 0")
    return frozen(settings.model, settings, mesh, device)


def load_objective(name: str) -> tuple[Callable | None, bool]:
    """The objective of that name (None: the fused dGRPO) and whether it couples tokens.

    A function of dgrpo.objectives or "module:function"; one with a parameter `sequence_ids` is
    given those of the micro-batch.
    """
    if name == "dgrpo":
        return None, False
    known = [n for n in objectives.__all__ if _is_objective(getattr(objectives, n))]
    if ":" in name:
        function = load_function(name, "method.objective")
    elif name in known:
        function = getattr(objectives, name)
    else:
        raise ValueError(
            f'method.objective: got {name!r}, expected one of {known} or "module:function"'
        )
    return function, "sequence_ids" in inspect.signature(function).parameters


def _is_objective(value: Any) -> bool:
    if not inspect.isfunction(value):
        return False
    names = list(inspect.signature(value).parameters)
    return names[:2] == ["stats", "context"] and value.__name__ not in ("kl_advantages", "k1_loss")
