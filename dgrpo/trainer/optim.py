"""The optimisers: AdamW, SGD, and Muon on the hidden matrices with AdamW on the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

OUTER = ("head", "lm_head")  # modules whose matrix is not a hidden one, beside the embeddings


class Rated(NamedTuple):
    """An optimiser and the peak of its learning rate."""

    optimizer: Optimizer
    peak: float


def make_optimizers(
    model: nn.Module,
    kind: str = "adamw",
    *,
    lr: float,
    muon_lr: float = 0.02,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
) -> list[Rated]:
    """The optimisers of the model's trained parameters: one, or two for "muon".

    `kind` is "adamw", "sgd" or "muon" (hidden matrices by Muon at `muon_lr`, the rest by AdamW at
    `lr`). Only matrices decay. Make them after the model is sharded.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model: got no trained parameter, expected some with requires_grad")
    adam = {"lr": lr, "betas": tuple(betas), "eps": eps}
    if kind == "sgd":
        groups = _decay_groups(trained, weight_decay)
        return [Rated(SGD(groups, lr=lr, momentum=momentum), lr)]
    if kind == "adamw":
        return [Rated(AdamW(_decay_groups(trained, weight_decay), **adam), lr)]
    if kind != "muon":
        raise ValueError(f"kind: got {kind!r}, expected 'adamw', 'sgd' or 'muon'")
    hidden = hidden_matrices(model)
    ids = {id(p) for p in hidden}
    rest = _decay_groups([p for p in trained if id(p) not in ids], weight_decay)
    muon = Muon(hidden, lr=muon_lr, momentum=momentum, weight_decay=weight_decay)
    return [Rated(muon, muon_lr), *([Rated(AdamW(rest, **adam), lr)] if rest else [])]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained 2-D weights between the embedding and the head, tied or not: Muon's share."""
    outer: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in OUTER:
            outer |= {id(p) for p in module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outer]


def set_lr(optimizers: Iterable[Rated], factor: float) -> float:
    """Sets each optimiser's rate to `factor` times its peak; returns the last one's, AdamW's."""
    rate = 0.0
    for optimizer, peak in optimizers:
        rate = peak * factor
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rate


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all local values are finite (one sync)."""
    checks = [torch.isfinite(local(t)).all() for t in tensors]
    return bool(torch.stack(checks).all()) if checks else True


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; a plain tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices, which decay, and vectors, which do not."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
