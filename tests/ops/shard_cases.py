"""What each rank of a vocabulary-parallel group runs for `test_vocab_parallel.py`.

A case gets a `Ranks`; on every rank it compares the sharded call with that of one process.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

import dgrpo
from dgrpo.testing import PeakedCase, relative_error
from tests.ops.cases import DIVERGENCES, TEACHERS, case_of, fp64, gradients, teacher_of

VOCAB = 101
BOUNDS = {2: (0, 61, VOCAB), 4: (0, 40, 41, 77, VOCAB)}  # uneven, one shard of a single column
BUDGET = 30000  # bytes: parts of 4 rows, two blocks


@dataclass(frozen=True)
class Ranks:
    """This rank's view: the whole case, and its columns of the vocabulary."""

    group: dist.ProcessGroup
    case: PeakedCase
    rank: int
    bounds: tuple[int, ...]

    @property
    def columns(self) -> slice:
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    def own(self, teacher: Any) -> Any:
        """A teacher's head cut to this rank's columns; a top-k teacher is the same everywhere."""
        if not isinstance(teacher, dgrpo.TeacherHead):
            return teacher
        bias = None if teacher.bias is None else teacher.bias[self.columns]
        return replace(teacher, weight=teacher.weight[self.columns], bias=bias)


def call(op: str, case: PeakedCase, weight: Any, **options: Any) -> tuple:
    """Outputs of an op, and its scalar."""
    inputs = (case.hidden, weight, case.targets)
    if op == "stats":
        out = dgrpo.linear_token_stats(*inputs, **options)
        return out, (out.divergence * out.logprobs - out.entropy).sum()
    if op == "plain":
        out = dgrpo.linear_loss(*inputs, lambda s, _: s.divergence - s.logprobs, **options)
        return out[:5], out.loss
    out = dgrpo.linear_dgrpo_loss(
        *inputs, case.advantages, old_logprobs=case.old_logprobs, entropy_coef=0.1, **options
    )
    return out, out.loss


def same(ranks: Ranks, op: str, most: float = 1e-9, **options: Any) -> None:
    """A sharded call and one in a single process: outputs and gradients, here and on all ranks."""
    case, columns = ranks.case, ranks.columns
    weight = case.weight.detach()[columns].clone().requires_grad_()
    bias = options.pop("bias", None)
    own_bias = None if bias is None else bias.detach()[columns].clone().requires_grad_()
    teacher = options.pop("teacher", None)
    want, want_loss = call(op, case, case.weight, teacher=teacher, bias=bias, **options)
    got, loss = call(
        op, case, weight, teacher=ranks.own(teacher), bias=own_bias, group=ranks.group,
        vocab_start=columns.start, memory_budget=BUDGET, **options,
    )  # fmt: skip
    for value, wanted in zip(got, want, strict=True):
        assert value.shape == wanted.shape
        assert relative_error(value.double(), wanted.double()) <= most
    if not want_loss.requires_grad:
        return
    grads = gradients(loss, case.hidden, weight, own_bias)
    goal = gradients(want_loss, case.hidden, case.weight, bias)
    goal = [goal[0], goal[1][columns], None if bias is None else goal[2][columns]]
    for value, wanted in zip(grads, goal, strict=True):
        if value is not None:
            assert relative_error(value, wanted) <= most
    bits = torch.cat([loss.detach().reshape(1), grads[0].flatten(), got[0].detach().flatten()])
    everyone = [torch.empty_like(bits) for _ in ranks.bounds[1:]]
    dist.all_gather(everyone, bits, group=ranks.group)
    assert all(torch.equal(bits, other) for other in everyone), "ranks differ in bits"


def every_divergence(ranks: Ranks, op: str, kind: str) -> None:
    for options in DIVERGENCES.values():
        same(ranks, op, teacher=teacher_of(kind, ranks.case), **options)


def no_teacher(ranks: Ranks) -> None:
    for op in ("fused", "plain", "stats"):
        same(ranks, op)


def transforms(ranks: Ranks) -> None:
    options = {
        "temperature": 0.8,
        "teacher_temperature": 1.3,
        "logit_scale": 0.7,
        "logit_softcap": 20.0,
        "bias": torch.linspace(-1, 1, VOCAB).double().requires_grad_(),
    }
    full = replace(teacher_of("full", ranks.case), bias=torch.linspace(2, 0, VOCAB).double())
    for op in ("fused", "stats"):
        same(ranks, op, teacher=full, **options)
        at_one = {**options, "teacher_temperature": 1.0}
        same(ranks, op, teacher=teacher_of("topk", ranks.case), **at_one)


def rounded_policy(ranks: Ranks) -> None:
    for op, kind in product(("fused", "stats"), ("full", "padded_topk")):
        options = {"policy_logits": "bfloat16", "logit_softcap": 25.0}
        same(ranks, op, teacher=teacher_of(kind, ranks.case), **options)


def truncated(ranks: Ranks) -> None:
    case = ranks.case
    case = case._replace(targets=case.targets.clamp(max=90))
    for op, kind in product(("fused", "stats"), ("full", "topk")):
        same(replace(ranks, case=case), op, teacher=teacher_of(kind, case), vocab_size=95)


def all_masked(ranks: Ranks) -> None:
    case = ranks.case._replace(targets=torch.full_like(ranks.case.targets, -100))
    for op in ("fused", "stats"):
        same(
            replace(ranks, case=case),
            op,
            teacher=teacher_of("full", case),
            divergence="jsd",
            jsd_beta=0.2,
        )


def without_gradient(ranks: Ranks) -> None:
    with torch.no_grad():
        for op in ("fused", "plain", "stats"):
            same(ranks, op, teacher=teacher_of("full", ranks.case))


def fp32_and_rows(ranks: Ranks) -> None:
    case = case_of(24)
    rows = (case.targets != -100).nonzero()[:, 0]
    same(replace(ranks, case=case), "fused", 1e-4, teacher=teacher_of("full", case), rows=rows)


def targets_outside(ranks: Ranks) -> None:
    case = ranks.case._replace(targets=ranks.case.targets.clone())
    case.targets[3] = VOCAB + 5
    own = case.weight.detach()[ranks.columns].requires_grad_()
    out, loss = call("fused", case, own, group=ranks.group, vocab_start=ranks.columns.start)
    assert loss.isnan() and out.logprobs[3].isnan() and out.logprobs.isnan().sum() == 1


def dtensor(ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    case = ranks.case
    mesh = init_device_mesh("cpu", (len(ranks.bounds) - 1,))
    weight = distribute_tensor(case.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    other = distribute_tensor(case.teacher_weight, mesh, [Shard(0)]).to_local()
    for op in ("fused", "stats"):
        want = call(op, case, case.weight, teacher=teacher_of("full", case))[1]
        teacher = dgrpo.TeacherHead(case.teacher_hidden, other)
        loss = call(op, case, weight, teacher=teacher, group=mesh.get_group())[1]
        d_hidden, d_weight = gradients(loss, case.hidden, weight)
        goal = gradients(want, case.hidden, case.weight)
        assert isinstance(d_weight, DTensor) and d_weight.placements == (Shard(0),)
        assert relative_error(d_hidden, goal[0]) < 1e-9
        assert relative_error(d_weight.full_tensor(), goal[1]) < 1e-9


def refused(ranks: Ranks, changed: dict[str, Any], op: str, words: str, elsewhere: str) -> None:
    """Arguments of the last rank alone are bad: every rank raises, and the next call works."""
    case = ranks.case
    last = ranks.rank == len(ranks.bounds) - 2
    options = {
        "teacher": ranks.own(teacher_of("full", case)),
        "group": ranks.group,
        "vocab_start": ranks.columns.start,
        "divergence": "jsd",
        **(changed if last else {}),
    }
    weight = options.pop("weight", case.weight.detach()[ranks.columns]).detach().requires_grad_()
    case = case._replace(**{k: options.pop(k) for k in ("hidden", "targets") if k in options})
    grad = options.pop("grad", True)
    try:
        with nullcontext() if grad else torch.no_grad():
            if op == "plain" and last:
                dgrpo.linear_loss(case.hidden, weight, case.targets, None, **options)
            else:
                call(op, case, weight, **options)
    except (TypeError, ValueError) as error:
        text = str(error)
        assert text.startswith((words if last else elsewhere) + ": got"), text
        assert "expected" in text
    else:
        raise AssertionError("raised nothing")
    same(ranks, "fused")


def bad_arguments(case: PeakedCase) -> dict[str, tuple]:
    """What the last rank passes, to which op, and the argument named there and elsewhere."""
    fewer = case.targets.clone()
    fewer[(fewer != -100).nonzero()[0]] = -100
    topk = teacher_of("topk", case)
    alone = ("group", "group")  # good by itself, but not what the others pass
    return {
        "temperature": ({"temperature": 0.0}, "fused", "temperature", "group"),
        "weight": ({"weight": torch.ones(7)}, "stats", "weight", "group"),
        "hidden": ({"hidden": case.hidden.float()}, "fused", "hidden", "group"),
        "objective": ({}, "plain", "objective", "group"),
        "teacher's width": (
            {"teacher": dgrpo.TeacherHead(case.teacher_hidden, torch.ones(24, 3).double())},
            "fused", "teacher.weight", "group"),
        "teacher's shard": (
            {"teacher": dgrpo.TeacherHead(case.teacher_hidden, torch.ones(7, 12).double())},
            "fused", "teacher.weight", "teacher.weight"),
        "start": ({"vocab_start": 3}, "fused", "vocab_start", "vocab_start"),
        "start is text": ({"vocab_start": "3"}, "fused", "vocab_start", "group"),
        "vocabulary is text": ({"vocab_size": "101"}, "stats", "vocab_size", "group"),
        "targets outside": (
            {"targets": case.targets + 999}, "fused", *alone),  # masked ones count as well
        "no teacher": ({"teacher": None}, "fused", *alone),
        "another teacher": ({"teacher": topk}, "stats", *alone),
        "another divergence": ({"divergence": "reverse_kl"}, "stats", *alone),
        "another vocabulary": ({"vocab_size": 100}, "fused", *alone),
        "another mask": ({"targets": fewer}, "fused", *alone),
        "frozen states": ({"hidden": case.hidden.detach()}, "fused", *alone),
        "values are checked": ({"check": True}, "fused", *alone),
        "no gradient": ({"grad": False}, "stats", *alone),
    }  # fmt: skip


def one_rank_is_wrong(ranks: Ranks, name: str) -> None:
    refused(ranks, *bad_arguments(ranks.case)[name])


def bad_value(ranks: Ranks) -> None:
    case, last = ranks.case, ranks.rank == len(ranks.bounds) - 2
    weight = case.weight.detach()[ranks.columns].clone()
    if last:
        weight[0, 0] = torch.nan
    try:
        call("stats", case, weight, group=ranks.group, check=True)
    except ValueError as error:
        assert str(error).startswith("weight: got 1" if last else "group: got arguments")
    else:
        raise AssertionError("raised nothing")


CASES = {
    **{
        f"{op}, {kind}": lambda ranks, op=op, kind=kind: every_divergence(ranks, op, kind)
        for op, kind in product(("fused", "plain", "stats"), TEACHERS)
    },
    "no teacher": no_teacher,
    "transforms": transforms,
    "rounded policy": rounded_policy,
    "truncated vocabulary": truncated,
    "all masked": all_masked,
    "without gradient": without_gradient,
    "fp32 with rows": fp32_and_rows,
    "targets outside": targets_outside,
    "dtensor": dtensor,
    "bad value": bad_value,
    **{
        f"wrong on one rank: {name}": lambda ranks, name=name: one_rank_is_wrong(ranks, name)
        for name in bad_arguments(fp64(case_of(24)))
    },
}
