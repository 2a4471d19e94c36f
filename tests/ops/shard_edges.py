"""More of what each rank of a vocabulary-parallel group runs: forbidden tokens, low precision."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

import dgrpo
from dgrpo.testing import oracle
from tests.ops.cases import DIVERGENCES, assert_near, case_of, gradients, teacher_of
from tests.ops.shard_cases import BUDGET, VOCAB, Ranks, same

SECOND_SHARD = slice(40, 41)  # all of it on 4 ranks, a part of the first on 2
LAST_SHARD = slice(61, None)  # all of it on 2 ranks, and more than it on 4
INFINITE = ("forward_kl", "jeffreys")  # where the student forbids what the teacher says


def forbidding(columns: slice) -> torch.Tensor:
    bias = torch.linspace(-1, 1, VOCAB).double()
    bias[columns] = -torch.inf
    return bias


def elsewhere(ranks: Ranks, columns: slice) -> Ranks:
    """The same case, its targets outside `columns`."""
    inside = torch.isin(ranks.case.targets, torch.arange(VOCAB)[columns])
    return replace(
        ranks, case=ranks.case._replace(targets=ranks.case.targets.masked_fill(inside, 3))
    )


def student_forbids(ranks: Ranks) -> None:
    for columns, cap in product((SECOND_SHARD, LAST_SHARD), (None, 20.0)):
        allowed, bias = elsewhere(ranks, columns), forbidding(columns).requires_grad_()
        for kind, name in product(("full", "padded_topk"), DIVERGENCES):
            if name in INFINITE:
                continue  # see below
            options = {"bias": bias, "logit_softcap": cap, **DIVERGENCES[name]}
            for op in ("fused", "stats"):
                same(allowed, op, teacher=teacher_of(kind, allowed.case), **options)


def teacher_forbids(ranks: Ranks) -> None:
    for columns in (SECOND_SHARD, LAST_SHARD):
        allowed = elsewhere(ranks, columns)
        full = replace(teacher_of("full", ranks.case), bias=forbidding(columns))
        for bias, options in product((None, forbidding(columns)), DIVERGENCES.values()):
            # Each shard holds what its teacher forbids at its own peak - 1e6, not the row's.
            most = 1e-4 if options["divergence"] == "reverse_kl" and bias is None else 1e-9
            if bias is not None:
                bias = bias.requires_grad_()
            same(allowed, "stats", most, teacher=full, bias=bias, **options)


def infinite_forward_kl(ranks: Ranks) -> None:
    for columns, kind, name in product((SECOND_SHARD, LAST_SHARD), ("full", "topk"), INFINITE):
        case = elsewhere(ranks, columns).case
        teacher = teacher_of(kind, case)
        if kind == "topk":
            ids = columns.start + torch.arange(-1, 3)
            teacher = replace(teacher, token_ids=ids.expand(24, 4).contiguous())
        own = case.weight.detach()[ranks.columns].clone().requires_grad_()
        bias = forbidding(columns)
        inputs = {"targets": case.targets, "divergence": name}
        got = dgrpo.linear_token_stats(
            case.hidden, own, teacher=ranks.own(teacher), bias=bias[ranks.columns],
            group=ranks.group, vocab_start=ranks.columns.start, memory_budget=BUDGET, **inputs,
        ).divergence.sum()  # fmt: skip
        want = dgrpo.linear_token_stats(
            case.hidden, case.weight, teacher=teacher, bias=bias, **inputs
        ).divergence.sum()
        assert got.isposinf() and want.isposinf()
        goal = gradients(want, case.hidden, case.weight)
        assert_near(gradients(got, case.hidden)[0], goal[0], 1e-9, "d_hidden")
        assert_near(gradients(got, own)[0], goal[1][ranks.columns], 1e-9, "d_weight")


def forbidden_target(ranks: Ranks) -> None:
    for columns in (SECOND_SHARD, LAST_SHARD):
        case = ranks.case._replace(targets=ranks.case.targets.clone())
        case.targets[0] = torch.arange(VOCAB)[columns][0]
        bias = forbidding(columns)
        out = dgrpo.linear_token_stats(
            case.hidden, case.weight.detach()[ranks.columns], case.targets,
            bias=bias[ranks.columns], group=ranks.group, vocab_start=ranks.columns.start,
        )  # fmt: skip
        assert out.logprobs[0].isneginf() and not out.logprobs.isnan().any()


def far_tail(ranks: Ranks) -> None:
    """A top-k teacher that sees a tail which the student puts hundreds of nats away."""
    case = ranks.case._replace(hidden=(ranks.case.hidden.detach() * 20).requires_grad_())
    ids = (case.hidden @ case.weight.T).topk(2).indices
    probs = torch.tensor([0.5, 0.2]).double().log().expand(24, 2).contiguous()
    for options in DIVERGENCES.values():
        far = replace(ranks, case=case)
        same(far, "stats", 1e-7, teacher=dgrpo.TopKTeacher(ids, probs), **options)


def fp16(ranks: Ranks) -> None:
    case = case_of(24, dtype=torch.float16)
    weights = torch.where(torch.arange(24) > 15, 1.0, 1e-6)
    for kind in ("full", "topk"):
        teacher = teacher_of(kind, case)
        own = case.weight.detach()[ranks.columns].clone().requires_grad_()
        inputs = (case.targets, case.advantages)
        out = dgrpo.linear_dgrpo_loss(
            case.hidden, own, *inputs, teacher=ranks.own(teacher), token_weights=weights,
            group=ranks.group, vocab_start=ranks.columns.start, memory_budget=BUDGET,
        )  # fmt: skip
        want = oracle(case.hidden, case.weight, *inputs, teacher=teacher, token_weights=weights)
        d_hidden, d_weight = gradients(out.loss, case.hidden, own)
        assert_near(d_hidden, want.d_hidden, 5e-3, "d_hidden")
        assert_near(d_weight, want.d_weight[ranks.columns], 5e-3, "d_weight")


CASES = {
    "student forbids": student_forbids,
    "teacher forbids": teacher_forbids,
    "infinite forward KL": infinite_forward_kl,
    "forbidden target": forbidden_target,
    "far tail": far_tail,
    "fp16": fp16,
}
