"""Which parameter goes to which optimiser, at which rate and decay; the rate over the steps."""

import pytest
from torch import nn

from dgrpo.trainer.config import Optimizer
from dgrpo.trainer.optim import hidden_matrices, lr_factor, make_optimizers, set_lr


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
    wanted = Optimizer(kind="muon", lr=0.1, muon_lr=0.3, weight_decay=0.01)
    muon, adamw = make_optimizers(model, wanted)
    given = [id(p) for own in (muon, adamw) for g in own.param_groups for p in g["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters())
    assert set_lr([muon, adamw], wanted, 0.5) == pytest.approx(0.05)
    assert muon.param_groups[0]["lr"] == pytest.approx(0.15)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_only_matrices_decay(kind):
    model = Model(tied=False)
    for optimizer in make_optimizers(model, Optimizer(kind=kind, lr=0.1, weight_decay=0.01)):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert group["weight_decay"] == (0.01 if p.ndim == 2 else 0.0)


def test_frozen_parameters_are_left_out():
    model = Model(tied=False)
    model.embed.requires_grad_(False)
    (adamw,) = make_optimizers(model, Optimizer())
    given = [id(p) for group in adamw.param_groups for p in group["params"]]
    assert id(model.embed.weight) not in given and len(given) == 5
    with pytest.raises(ValueError, match="model: got no trained parameter"):
        make_optimizers(model.requires_grad_(False), Optimizer())


def factors(steps, **changes):
    settings = Optimizer(**{"warmup_steps": 0, "decay": "linear", **changes})
    return [lr_factor(settings, step, steps) for step in range(steps)]


def test_warm_up_then_constant():
    assert factors(4, warmup_steps=2, decay="constant") == [0.5, 1.0, 1.0, 1.0]


def test_decay_over_the_last_part():
    found = factors(10, decay_fraction=0.5, final_fraction=0.1)
    assert found[:5] == [1.0] * 5
    assert found[5:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def test_cosine_ends_at_its_fraction():
    found = factors(8, decay="cosine", final_fraction=0.25)
    assert found[-1] == pytest.approx(0.25) and found == sorted(found, reverse=True)


def test_without_an_end_there_is_no_decay():
    assert lr_factor(Optimizer(decay="linear"), 50, None) == 1.0
