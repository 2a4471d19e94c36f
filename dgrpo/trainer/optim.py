"""The optimisers and their rate: AdamW, SGD, or Muon on hidden matrices and AdamW on the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon

from dgrpo.trainer.config import Optimizer

OUTER = ("head", "lm_head")  # modules whose matrix is not a hidden one, beside the embeddings


def make_optimizers(model: nn.Module, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """The optimisers of the model's trained parameters: one, or two for "muon".

    Only matrices decay. Make them after the model is sharded.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model: got no trained parameter, expected some with requires_grad")
    decay, momentum = settings.weight_decay, settings.momentum
    if settings.kind == "sgd":
        return [SGD(_decay_groups(trained, decay), lr=settings.lr, momentum=momentum)]
    muon = []
    if settings.kind == "muon":
        hidden = hidden_matrices(model)
        ids = {id(p) for p in hidden}
        trained = [p for p in trained if id(p) not in ids]
        muon = [Muon(hidden, lr=settings.muon_lr, momentum=momentum, weight_decay=decay)]
    if not trained:
        return muon
    betas, groups = tuple(settings.betas), _decay_groups(trained, decay)
    return [*muon, AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps)]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained 2-D weights between the embedding and the head, tied or not: Muon's share."""
    outer: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in OUTER:
            outer |= {id(p) for p in module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outer]


def set_lr(
    optimizers: Iterable[torch.optim.Optimizer], settings: Optimizer, factor: float
) -> float:
    """Set each optimiser's rate to `factor` times its peak; returns the last one's, AdamW's."""
    rate = 0.0
    for optimizer in optimizers:
        rate = factor * (settings.muon_lr if isinstance(optimizer, Muon) else settings.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rate


def lr_factor(settings: Optimizer, step: int, total: int | None) -> float:
    """Factor on the peak learning rate at the 0-based `step` of `total`.

    A linear warm-up, 1 in between, and over the last `decay_fraction` of the steps a decay to
    `final_fraction`. A function of the step alone: a resumed run needs no state for it.
    """
    warmup = settings.warmup_steps
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if settings.decay == "constant" or total is None:
        return factor
    length = max(1, round(total * settings.decay_fraction))
    done = min(1.0, max(0.0, (step + 1 - (total - length)) / length))
    if settings.decay == "cosine":
        done = (1.0 - math.cos(math.pi * done)) / 2.0
    return factor * (1.0 - (1.0 - settings.final_fraction) * done)


def _decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices, which decay, and vectors, which do not."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
