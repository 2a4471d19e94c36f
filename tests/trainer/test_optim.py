"""Which parameter goes to which optimiser, at which rate and decay."""

import pytest
import torch
from torch import nn

from dgrpo.trainer.optim import all_finite, hidden_matrices, make_optimizers, set_lr


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_hidden_matrices_alone(tied):
    model = Model(tied)
    hidden = {id(p) for p in hidden_matrices(model)}
    assert hidden == {id(model.up.weight), id(model.down.weight)}
    muon, adamw = make_optimizers(model, "muon", lr=0.1, muon_lr=0.3, weight_decay=0.01)
    given = [
        id(p) for rated in (muon, adamw) for g in rated.optimizer.param_groups for p in g["params"]
    ]
    assert sorted(given) == sorted(id(p) for p in model.parameters())
    assert set_lr([muon, adamw], 0.5) == pytest.approx(0.05)
    assert muon.optimizer.param_groups[0]["lr"] == pytest.approx(0.15)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_only_matrices_decay(kind):
    model = Model(tied=False)
    for rated in make_optimizers(model, kind, lr=0.1, weight_decay=0.01):
        for group in rated.optimizer.param_groups:
            for p in group["params"]:
                assert group["weight_decay"] == (0.01 if p.ndim == 2 else 0.0)


def test_frozen_parameters_are_left_out():
    model = Model(tied=False)
    model.embed.requires_grad_(False)
    (rated,) = make_optimizers(model, "adamw", lr=0.1)
    given = [id(p) for group in rated.optimizer.param_groups for p in group["params"]]
    assert id(model.embed.weight) not in given and len(given) == 5
    with pytest.raises(ValueError, match="model: got no trained parameter"):
        make_optimizers(model.requires_grad_(False), "adamw", lr=0.1)


def test_all_finite():
    assert all_finite([torch.ones(3), torch.zeros(2)])
    assert not all_finite([torch.ones(3), torch.tensor([1.0, float("nan")])])
