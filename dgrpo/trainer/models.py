"""The models of a run from its settings: where they lie, policy, teacher, reference, objective."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoConfig

from dgrpo import objectives
from dgrpo.distributed import ranks, start
from dgrpo.endpoint import Endpoint
from dgrpo.extras import load_function
from dgrpo.trainer.config import Model, RunSettings
from dgrpo.trainer.config import Teacher as TeacherSettings
from dgrpo.trainer.config.settings import Lora
from dgrpo.trainer.loading import common_vocab, loading, teacher_tokenizer
from dgrpo.trainer.policy import PolicyModel, fsdp, huggingface
from dgrpo.trainer.teachers import SelfTeacher, ServedTeacher, Teacher

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
    where = "model" if group is settings.model else "teacher"
    model = _pretrained(where, group, dtype=getattr(torch, wanted))
    model.requires_grad_(False).eval()
    return model.to(device) if mesh is None else fsdp.shard(model, mesh)


def _pretrained(where: str, group: Model | TeacherSettings, **options: Any) -> PolicyModel:
    """The model that a group of settings names."""
    with loading(f"{where}.name", group.name):
        loaded = huggingface.from_pretrained(
            group.name,
            revision=group.revision,
            trust_remote_code=group.trust_remote_code,
            **options,
        )
    return PolicyModel(loaded)


def load_policy(model: Model, seed: int = 0) -> PolicyModel:
    """The policy, not sharded yet; `seed` is that of random weights and adapters."""
    torch.manual_seed(seed)
    dtype, lora = getattr(torch, model.dtype), lora_config(model.lora)
    if model.name is not None:
        return _pretrained("model", model, dtype=dtype, lora=lora, liger=model.liger)
    fields = dict(model.config)
    kind = fields.pop("model_type")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=3)
        raise ValueError(f"model.config.model_type: got {kind!r}, did you mean one of {near}?")
    known = {*dir(AutoConfig.for_model(kind)), *OLD_FIELDS}
    for key in (key for key in fields if key not in known):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"model.config.{key}: unknown to {kind}{hint}")
    config = AutoConfig.for_model(kind, **fields)
    return PolicyModel(huggingface.from_config(config, dtype=dtype, lora=lora, liger=model.liger))


def lora_config(lora: Lora | None) -> LoraConfig | None:
    """peft's configuration of the adapters; None without."""
    if lora is None:
        return None
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[*lora.targets, "lm_head"] if lora.head else lora.targets,
        task_type="CAUSAL_LM",
    )


class LoadedTeacher(NamedTuple):
    """The teacher of a run, and what its model asks of the loss."""

    teacher: Teacher | SelfTeacher | ServedTeacher | None = None
    vocab_size: int | None = None  # columns in which the heads are compared; None: all
    context: int | None = None  # tokens that it can read; None: no limit


def load_teacher(
    settings: RunSettings, model: PolicyModel, tokenizer: Any, mesh: Any, device: torch.device
) -> LoadedTeacher:
    """The teacher of the method, compared with the policy `model` and its tokenizer."""
    method, wanted = settings.method, settings.teacher
    if not method.teaches():
        return LoadedTeacher()
    if method.teacher == "self":
        return LoadedTeacher(SelfTeacher(model, offload_above=wanted.host_above))
    theirs = teacher_tokenizer(settings, tokenizer)
    if method.teacher == "served":
        endpoint = Endpoint(
            wanted.url, wanted.name, wanted.key_variable, wanted.timeout, retries=3, workers=16
        )
        return LoadedTeacher(ServedTeacher(endpoint, wanted.top_k))
    teacher, size = frozen(wanted, settings, mesh, device), wanted.vocab_size
    if size is None and model.vocab_size != teacher.vocab_size:
        compared = None if theirs is None else tokenizer
        size = common_vocab(model.vocab_size, teacher.vocab_size, compared)
    own = Teacher(teacher, offload_above=wanted.host_above, offload_body=wanted.offload_body)
    return LoadedTeacher(own, size, teacher.context)


def load_reference(settings: RunSettings, mesh: Any, device: torch.device) -> PolicyModel | None:
    """The starting policy, frozen, where `ref_coef` asks for it."""
    if settings.method.ref_coef == 0.0:
        return None
    return frozen(settings.model, settings, mesh, device)


def load_objective(name: str) -> tuple[Callable | None, bool]:
    """The objective of that name (None: the fused dGRPO) and whether it couples tokens.

    A function of dgrpo.objectives or "module:function"; one with a parameter `sequence_ids` is
    given those of the micro-batch.
    """
    if name == "dgrpo":
        return None, False
    functions = inspect.getmembers(objectives, inspect.isfunction)
    known = {
        own: function
        for own, function in functions
        if [*inspect.signature(function).parameters][:2] == ["stats", "context"]
        and own not in ("kl_advantages", "k1_loss")
    }
    if ":" not in name and name not in known:
        raise ValueError(
            f'method.objective: got {name!r}, expected one of {[*known]} or "module:function"'
        )
    function = known.get(name) or load_function("method.objective", name)
    return function, "sequence_ids" in inspect.signature(function).parameters
