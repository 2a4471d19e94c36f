"""Every tensor of a model and its optimisers under one flat name, sharded or not.

torch's `get_optimizer_state_dict` takes a step on an optimiser that has no state yet, so that a
checkpoint before the first step would change the run (Adam's step count would start at 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from dgrpo.trainer.checkpoint.errors import CheckpointError

# What torch.compile and activation-checkpoint wrappers put into a parameter's name.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def _clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


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
            tensors[f"model.{_clean(name)}"] = value.detach()
    return tensors


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: _clean(name) for name, parameter in model.named_parameters()}


def optimizer_tensors(
    model: nn.Module, optimizers: Sequence[Optimizer]
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The optimisers' state as `{"optimizer.<i>.<name>.<key>": tensor}`, and the rest of it.

    The rest, one dict per optimiser: `kind` (its class), `groups` (each group's settings, `params`
    as names) and `state` (`{name: {key: {"value": value}, or None for a tensor}}`).
    """
    tensors, rest = {}, []
    names = _names(model)
    for i, optimizer in enumerate(optimizers):
        groups = [
            {**group, "params": [_name(names, parameter) for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        state: dict[str, dict] = {}
        for parameter, values in optimizer.state.items():
            name = _name(names, parameter)
            state[name] = {}
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    state[name][key] = None
                    tensors[f"optimizer.{i}.{name}.{key}"] = value.detach()
                else:
                    state[name][key] = {"value": value}
        rest.append({"kind": type(optimizer).__name__, "groups": groups, "state": state})
    return tensors, rest


def _name(names: dict[nn.Parameter, str], parameter: nn.Parameter) -> str:
    if parameter not in names:
        raise ValueError(
            f"optimizer: got a parameter of shape {tuple(parameter.shape)}, expected the model's; "
            "make the optimizer after the model is sharded"
        )
    return names[parameter]


def optimizer_templates(
    model: nn.Module, rest: list[dict], saved: dict[str, TensorStorageMetadata]
) -> dict[str, torch.Tensor]:
    """Empty tensors to load the saved optimiser state into, sharded like its parameter.

    What is not shaped like its parameter (a step count) is whole on every rank, on the CPU, until
    the optimiser loads it.
    """
    parameters = {name: parameter for parameter, name in _names(model).items()}
    templates = {}
    for i, part in enumerate(rest):
        for name, values in part["state"].items():
            for key in [key for key, value in values.items() if value is None]:
                full = f"optimizer.{i}.{name}.{key}"
                dtype, shape = saved[full].properties.dtype, saved[full].size
                parameter = parameters.get(name)
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
    if len(optimizers) != len(rest):
        raise CheckpointError(
            f"optimizer: got {len(optimizers)} of them, the checkpoint has {len(rest)}"
        )
    for i, (optimizer, part) in enumerate(zip(optimizers, rest, strict=True)):
        kind = type(optimizer).__name__
        if part["kind"] != kind:
            raise CheckpointError(f"optimizer {i}: got {kind}, the checkpoint has {part['kind']}")
        here = [[_name(names, p) for p in group["params"]] for group in optimizer.param_groups]
        there = [group["params"] for group in part["groups"]]
        if here != there:
            raise CheckpointError(f"optimizer {i}: {_difference(here, there)}")
        index = {name: n for n, name in enumerate(itertools.chain(*here))}
        state = {
            index[name]: {
                key: tensors[f"optimizer.{i}.{name}.{key}"] if value is None else value["value"]
                for key, value in values.items()
            }
            for name, values in part["state"].items()
        }
        groups = []
        for group, saved in zip(optimizer.param_groups, part["groups"], strict=True):
            rates = {key: saved[key] for key in ("lr", "initial_lr") if key in saved}
            groups.append({**group, **rates, "params": [index[name] for name in saved["params"]]})
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _difference(here: list[list[str]], there: list[list[str]]) -> str:
    """How the parameter groups of a run and of a checkpoint differ, in one line."""
    if len(here) != len(there):
        return f"got {len(here)} parameter groups, the checkpoint has {len(there)}"
    for number, (mine, saved) in enumerate(zip(here, there, strict=True)):
        if more := [name for name in mine if name not in saved]:
            return f"parameter group {number} has {more[0]}, the checkpoint's has not"
        if less := [name for name in saved if name not in mine]:
            return f"parameter group {number} lacks {less[0]}, which the checkpoint's has"
    return "the parameters of its groups are in another order than in the checkpoint"
