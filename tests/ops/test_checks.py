"""`check=True` and indices: what is valid is taken, what would spoil the result raises by name."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

import dgrpo
from dgrpo.head import FusedHead, HeadInputs
from dgrpo.objectives import Context, cispo
from dgrpo.testing import oracle_stats
from tests.ops.cases import teacher_of
from tests.ops.contracts import CASE, OPS, N, V, given, head_teacher, raises, run, topk

NAN, INF = torch.nan, torch.inf


# -- a top-k teacher without columns -------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_a_top_k_teacher_without_columns_says_nothing(op, divergence, backend):
    own = torch.full((N,), -3.0)
    teacher = topk(token_ids=torch.empty(N, 0, dtype=torch.int64), logprobs=torch.empty(N, 0))
    without = {"teacher_coef": 0.0} if op == "dgrpo" else {}
    want = torch.autograd.grad(run(op, backend=backend, **without), CASE.hidden)[0]
    found = torch.autograd.grad(
        run(op, backend=backend, teacher=teacher, divergence=divergence, check=True), CASE.hidden
    )[0]
    assert torch.allclose(found, want, atol=1e-6)
    teacher = topk(
        token_ids=torch.empty(N, 0, dtype=torch.int64),
        logprobs=torch.empty(N, 0),
        target_logprobs=own,
    )
    stats = dgrpo.linear_token_stats(**given(), teacher=teacher, backend=backend)
    assert stats.divergence.abs().max() < 1e-6 and torch.equal(stats.teacher_logprobs, own)


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher, argument",
    [
        (head_teacher(weight=CASE.teacher_weight * NAN), "teacher.weight"),
        (head_teacher(bias=torch.full((V,), NAN)), "teacher.bias"),
        (head_teacher(bias=torch.full((V,), INF)), "teacher.bias"),
        (topk(target_logprobs=torch.full((N,), NAN)), "teacher.target_logprobs"),
        (topk(target_logprobs=torch.full((N,), 0.5)), "teacher.target_logprobs"),
    ],
)
@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_bad_values_of_a_teacher_are_found(op, teacher, argument):
    kind = ValueError
    raises(kind, argument, "expected", run, op, teacher=teacher, check=True)


def test_a_gathered_teachers_weight_is_checked_too():
    @contextmanager
    def opened():
        yield CASE.teacher_weight * NAN, None

    raises(
        ValueError,
        "teacher.weight",
        "NaN",
        run,
        "stats",
        teacher=head_teacher(weight=opened),
        check=True,
    )


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_scalar_tensor_is_found(value):
    raises(
        ValueError, "teacher_coef", "expected", run, "dgrpo",
        teacher=head_teacher(), teacher_coef=torch.tensor(value), check=True,
    )  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_a_forbidden_column_is_valid(op):
    bias = torch.zeros(V)
    bias[(CASE.targets[0] + 1) % V] = -INF
    assert run(op, bias=bias, check=True).isfinite()
    bias[0] = INF
    raises(ValueError, "bias", "expected", run, op, bias=bias, check=True)


@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_states_of_tokens_without_loss_may_be_anything(op):
    targets, hidden, theirs = (
        CASE.targets.clone(),
        CASE.hidden.detach().clone(),
        CASE.teacher_hidden.clone(),
    )
    targets[2] = -100
    hidden[2], theirs[2] = NAN, INF
    shared = {"targets": targets, "hidden": hidden.requires_grad_(), "check": True}
    assert run(op, teacher=head_teacher(hidden=theirs), **shared).isfinite()
    rows = torch.arange(N)
    rows[4], theirs[4] = -1, NAN  # nor those that belong to no token
    assert run(op, teacher=head_teacher(hidden=theirs, rows=rows), **shared).isfinite()
    hidden = hidden.detach().clone()
    hidden[3] = NAN
    raises(ValueError, "hidden", "NaN", run, op, **{**shared, "hidden": hidden})


def test_infinite_log_probabilities_where_nothing_depends_on_them():
    advantages, old = CASE.advantages.clone(), CASE.old_logprobs.clone()
    advantages[1], old[1] = 0.0, -INF
    shared = {"advantages": advantages, "check": True}
    assert run("dgrpo", old_logprobs=old, **shared).isfinite()
    assert run("dgrpo", sampler_logprobs=old, **shared).isfinite()
    weights = torch.full((N,), 0.1)
    weights[2], old[2] = 0.0, NAN
    assert run("dgrpo", old_logprobs=old, token_weights=weights, **shared).isfinite()
    old[3] = INF
    raises(
        ValueError,
        "old_logprobs",
        "1",
        run,
        "dgrpo",
        old_logprobs=old,
        token_weights=weights,
        **shared,
    )


# -- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[0, 9], [-1, 2], [0, 6]])
@pytest.mark.parametrize("op", OPS)
def test_rows_outside_of_the_tokens(op, rows):
    raises(ValueError, "rows", "0 to 5", run, op, rows=torch.tensor(rows))


@pytest.mark.parametrize("row", [6, -2])
@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_rows_outside_of_the_teachers_states(op, row):
    rows = torch.arange(N)
    rows[3] = row
    raises(ValueError, "teacher.rows", "-1 to 5", run, op, teacher=head_teacher(rows=rows))


@pytest.mark.parametrize("field", ["advantages", "old_logprobs", "token_weights", "teacher_coef"])
def test_a_context_of_other_tokens(field):
    own = {"advantages": CASE.advantages, "token_weights": torch.full((N,), 0.1)}
    short = Context(**{**own, field: torch.ones(N - 2)})
    with pytest.raises(ValueError, match=rf"{field}: got .*{N - 2}"):
        dgrpo.linear_loss(**given(), objective=lambda s, rows: cispo(s, short.at(rows), 5.0))
    head = FusedHead(16, V)
    for inputs in (
        {"context": short},
        {"context": short, "objective": lambda s, c: s.logprobs},
        {"context": short, "mode": "stats", "sequence_objective": lambda s, c: s.logprobs},
    ):
        with pytest.raises(ValueError, match=rf"{field}: got .*{N - 2}"):
            head(CASE.hidden, HeadInputs(CASE.targets, **inputs))


@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_a_teachers_values_of_tokens_without_loss_may_be_anything(op):
    targets = CASE.targets.clone()
    targets[2] = -100
    rows = torch.arange(N)
    rows[2] = 999
    assert run(op, targets=targets, teacher=head_teacher(rows=rows), check=True).isfinite()
    ids, logprobs, own = topk().token_ids.clone(), topk().logprobs.clone(), torch.full((N,), -1.0)
    ids[2], logprobs[2], own[2] = 999, NAN, NAN
    assert run(
        op,
        targets=targets,
        teacher=topk(token_ids=ids, logprobs=logprobs, target_logprobs=own),
        check=True,
    ).isfinite()


@pytest.mark.parametrize("name", ["teacher_coef", "token_weights"])
def test_a_teachers_state_may_be_anything_where_it_does_not_teach(name):
    off, hidden = torch.ones(N), CASE.teacher_hidden.clone()
    off[3], hidden[3] = 0.0, NAN
    teacher = head_teacher(hidden=hidden)
    assert run("dgrpo", teacher=teacher, check=True, **{name: off}).isfinite()
    raises(ValueError, "teacher.hidden", "NaN", run, "dgrpo", teacher=teacher, check=True)


@pytest.mark.parametrize("op", OPS)
def test_a_row_twice_counts_no_token_twice(op):
    raises(ValueError, "rows", "2 once", run, op, rows=torch.tensor([0, 2, 2]))


@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_a_gathered_teachers_bias_has_one_value_per_column(op):
    short = replace(
        head_teacher(), weight=lambda: nullcontext((CASE.teacher_weight, torch.zeros(3)))
    )
    raises(ValueError, "teacher.bias", "(3,) (101,)", run, op, teacher=short)


def test_a_number_beyond_floats():
    raises(ValueError, "temperature", "finite", run, "dgrpo", temperature=10**400)


def test_a_context_broadcasts_over_nothing():
    targets = CASE.targets[:, None]
    context = Context(CASE.advantages, torch.full((N,), 0.1))
    with_it = {"context": context, "sequence_objective": lambda s, c: c.token_weights * s.logprobs}
    raises(ValueError, "advantages", "(6,) (6, 1)", HeadInputs, targets, mode="stats", **with_it)


def test_an_objective_that_is_text():
    raises(TypeError, "objective", "str", HeadInputs, CASE.targets, objective="grpo")


def test_the_oracle_knows_a_teacher_without_columns():
    none = topk(token_ids=torch.empty(N, 0, dtype=torch.int64), logprobs=torch.empty(N, 0))
    stats = oracle_stats(CASE.hidden, CASE.weight, CASE.targets, none)
    assert stats.divergence.abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["full", "topk"])
def test_all_of_this_lets_good_calls_pass(kind):
    for op in ("dgrpo", "loss", "stats"):
        assert run(op, teacher=teacher_of(kind, CASE), check=True).isfinite()
