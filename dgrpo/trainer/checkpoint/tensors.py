"""Every tensor of a model and its optimisers under one flat name, sharded or not.

torch's `get_optimizer_state_dict` takes a step on an optimiser that has no state yet, so that a
checkpoint before the first step would change the run (Adam's step count would start at 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from dgrpo.trainer.checkpoint.errors import CheckpointError


def model_tensors(model: nn.Module, frozen: bool = True) -> dict[str, torch.Tensor]:
    """`{"model.<name>": tensor}`: parameters and saved buffers, a shared one once, not copied.

    `frozen=False` leaves out what needs no gradient.
    """
    tensors, seen = {}, set()
    # state_dict() and not named_parameters(): its hooks reshard what FSDP2 has left gathered.
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor) or id(value) in seen:
            continue
        if frozen or value.requires_grad:
            seen.add(id(value))
            tensors[f"model.{name}"] = value.detach()
    return tensors


def optimizer_tensors(
    model: nn.Module, optimizers: Sequence[Optimizer]
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The optimisers' state as `{"optimizer.<i>.<name>.<key>": tensor}`, and the rest of it.

    The rest, one dict per optimiser: `kind` (its class) and `groups` (each group's rates, `params`
    as names).
    """
    tensors, rest, names = {}, [], _names(model)
    for i, optimizer in enumerate(optimizers):
        groups = [
            _rates(group) | {"params": [_name(names, parameter) for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                tensors[f"optimizer.{i}.{_name(names, parameter)}.{key}"] = value.detach()
        rest.append({"kind": type(optimizer).__name__, "groups": groups})
    return tensors, rest


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _name(names: dict[nn.Parameter, str], parameter: nn.Parameter) -> str:
    if parameter not in names:
        raise ValueError(
            f"optimizer: got a parameter of shape {tuple(parameter.shape)}, expected the model's; "
            "make the optimizer after the model is sharded"
        )
    return names[parameter]


def _rates(group: dict) -> dict[str, float]:
    return {key: group[key] for key in ("lr", "initial_lr") if key in group}


def _parts(full: str) -> tuple[int, str, str]:
    """(i, parameter's name, key) of `optimizer.<i>.<name>.<key>`."""
    _, number, path = full.split(".", 2)
    name, _, key = path.rpartition(".")
    return int(number), name, key


def load_tensors(folder: Path, model: nn.Module, frozen: bool) -> dict[str, torch.Tensor]:
    """Load the model's tensors in place; returns those of the optimisers.

    Of each file only the parts that this rank needs are read.
    """
    reader, planner = HuggingFaceStorageReader(folder), DefaultLoadPlanner(flatten_state_dict=False)
    metadata = reader.read_metadata()
    templates = _templates(model, metadata.state_dict_metadata)
    planner.set_up_planner(model_tensors(model, frozen) | templates, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(planner.create_local_plan(), planner)
    return templates


def _templates(
    model: nn.Module, saved: dict[str, TensorStorageMetadata]
) -> dict[str, torch.Tensor]:
    """Empty tensors to load the saved optimiser state into, sharded like its parameter.

    What is not shaped like its parameter (a step count) is whole on every rank, on the CPU, until
    the optimiser loads it.
    """
    parameters = {name: parameter for parameter, name in _names(model).items()}
    templates = {}
    for full in (full for full in saved if full.startswith("optimizer.")):
        parameter, shape = parameters.get(_parts(full)[1]), saved[full].size
        dtype = saved[full].properties.dtype
        if parameter is not None and parameter.shape == shape and shape:
            templates[full] = torch.empty_like(parameter.detach(), dtype=dtype)
        else:
            templates[full] = torch.empty(shape, dtype=dtype)
    return templates


def load_optimizers(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    rest: list[dict],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Give the optimisers the saved state and learning rate; other options stay as they are.

    Raises:
        CheckpointError: the optimisers' number, kind or parameters differ.
    """
    names = _names(model)
    here, there = [type(o).__name__ for o in optimizers], [part["kind"] for part in rest]
    if here != there:
        raise CheckpointError(f"optimizer: got {here}, the checkpoint has {there}")
    for i, (optimizer, part) in enumerate(zip(optimizers, rest, strict=True)):
        own = [[_name(names, p) for p in group["params"]] for group in optimizer.param_groups]
        saved = [group["params"] for group in part["groups"]]
        if own != saved:
            raise CheckpointError(f"optimizer {i}: {_difference(own, saved)}")
        index = {name: n for n, name in enumerate(itertools.chain(*own))}
        state: dict[int, dict] = {}
        for full, tensor in tensors.items():
            number, name, key = _parts(full)
            if number == i:
                state.setdefault(index[name], {})[key] = tensor
        groups = [
            {**group, **_rates(kept), "params": [index[name] for name in kept["params"]]}
            for group, kept in zip(optimizer.param_groups, part["groups"], strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _difference(here: list[list[str]], there: list[list[str]]) -> str:
    """How the parameter groups of a run and of a checkpoint differ, in one line."""
    mine, saved = (
        [(n, name) for n, names in enumerate(groups) for name in names] for groups in (here, there)
    )
    for number, name in mine + saved:
        if (number, name) not in saved:
            return f"parameter group {number} has {name}, the checkpoint's has not"
        if (number, name) not in mine:
            return f"parameter group {number} lacks {name}, which the checkpoint's has"
    return "the parameters of its groups are in another order than in the checkpoint"
