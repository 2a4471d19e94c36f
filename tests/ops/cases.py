"""Teachers, divergences and the comparison with the oracle that the loss head's tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dgrpo
from dgrpo.testing import OracleOutput, PeakedCase, oracle, peaked_case, relative_error

DIVERGENCES = {
    "reverse_kl": {"divergence": "reverse_kl"},
    "forward_kl": {"divergence": "forward_kl"},
    "clipped_forward_kl": {"divergence": "clipped_forward_kl", "divergence_clip": 0.05},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "jeffreys": {"divergence": "jeffreys", "jeffreys_weight": 0.3},
}
TEACHERS = ("full", "by_rows", "topk", "padded_topk")
GIVEN = ("logprobs", "teacher_logprobs", "divergence", "entropy", "ratio")
FLAGS = ("clipped", "clamped")


def teacher_of(kind: str, case: PeakedCase) -> dgrpo.TeacherHead | dgrpo.TopKTeacher:
    """A teacher of one of `TEACHERS`, all from the case's own teacher."""
    if kind == "full":
        return dgrpo.TeacherHead(case.teacher_hidden, case.teacher_weight)
    if kind == "by_rows":  # in another order, and some tokens without a teacher
        tokens = len(case.targets)
        order = torch.arange(tokens - 1, -1, -1, device=case.targets.device)
        rows = order.clone()
        rows[::5] = -1
        return dgrpo.TeacherHead(case.teacher_hidden[order], case.teacher_weight, rows=rows)
    if kind not in TEACHERS:
        raise ValueError(f"kind: got {kind!r}, expected one of {TEACHERS}")
    log_q = (case.teacher_hidden.double() @ case.teacher_weight.double().T).log_softmax(-1)
    own = log_q.gather(1, case.targets.clamp(min=0)[:, None])[:, 0]
    best, ids = log_q.topk(min(4, log_q.shape[1] - 1))
    best = best.to(case.advantages.dtype)
    if kind == "topk":
        return dgrpo.TopKTeacher(ids, best)
    ids, best = ids.clone(), best.clone()
    ids[::3, -1], best[::3, -1] = -1, 0.0  # a padded entry's log-probability is anything
    ids[(case.targets != -100).nonzero()[1:2, 0]] = -1  # no teacher at all
    return dgrpo.TopKTeacher(ids, best, own.to(best.dtype))


def case_of(tokens: int = 24, vocab: int = 101, **options: Any) -> PeakedCase:
    """A small peaked case; hidden and weight are leaves, about a quarter of the tokens masked."""
    options = {"teacher_width": 12, "masked": 0.25, **options}
    case = peaked_case(tokens, 16, vocab, **options)
    case.hidden.requires_grad_()
    case.weight.requires_grad_()
    return case


def fp64(case: PeakedCase) -> PeakedCase:
    """The same case in fp64, hidden and weight as new leaves."""
    wide = PeakedCase(*(x.detach().double() if x.is_floating_point() else x for x in case))
    wide.hidden.requires_grad_()
    wide.weight.requires_grad_()
    return wide


def gradients(loss: Tensor, *leaves: Tensor | None) -> list[Tensor | None]:
    """Gradients of the leaves that there are."""
    there = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(loss, there, retain_graph=True))
    return [None if leaf is None else next(found) for leaf in leaves]


def assert_near(got: Tensor, want: Tensor, most: float, name: str) -> None:
    error = relative_error(got, want)
    assert error <= most, f"{name}: relative error {error:.2e}, allowed {most:.0e}"


def assert_matches(
    got: dgrpo.DgrpoOutput, want: OracleOutput, grads: list[Tensor | None], most: float
) -> None:
    """Loss, statistics and gradients of hidden, weight and bias against the oracle's."""
    assert_near(got.loss.reshape(1), want.loss.reshape(1), most, "loss")
    for name in GIVEN:
        assert_near(getattr(got, name), getattr(want, name), most, name)
    for name in FLAGS:
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name).bool().cpu()), name
    for name in ("d_hidden", "d_weight", "d_bias"):
        got_grad = grads[("d_hidden", "d_weight", "d_bias").index(name)]
        if got_grad is not None:
            assert_near(got_grad, getattr(want, name), most, name)


def check_dgrpo(case: PeakedCase, most: float, backend: str = "auto", **options: Any) -> None:
    """`linear_dgrpo_loss` on a case against the oracle on the same, already rounded, inputs."""
    inputs = (case.hidden, case.weight, case.targets, case.advantages)
    got = dgrpo.linear_dgrpo_loss(*inputs, backend=backend, **options)
    grads = gradients(got.loss, case.hidden, case.weight, options.get("bias"))
    options = {k: v for k, v in options.items() if k not in ("memory_budget", "rows", "check")}
    assert_matches(got, oracle(*inputs, **options), grads, most)
