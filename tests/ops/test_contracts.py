"""Arguments at their limits: what is valid is taken, what cannot be honoured raises by name."""

import re

import numpy as np
import pytest
import torch

import dgrpo
from dgrpo.head import FusedHead, HeadInputs
from dgrpo.objectives import Context, cispo
from tests.ops.cases import case_of, gradients, teacher_of

N, V = 6, 101
CASE = case_of(N, V, masked=0.0)
NAN, INF = torch.nan, torch.inf
OPS = ("dgrpo", "loss", "stats", "logprobs")


def given(**changed):
    return {"hidden": CASE.hidden, "weight": CASE.weight, "targets": CASE.targets, **changed}


def run(op, **changed):
    """One call of an op, by a short name; a scalar to differentiate."""
    if op == "dgrpo":
        arguments = {"advantages": CASE.advantages, **given(**changed)}
        return dgrpo.linear_dgrpo_loss(**arguments).loss
    if op == "loss":
        objective = changed.pop("objective", lambda s, rows: s.divergence - s.logprobs)
        return dgrpo.linear_loss(objective=objective, **given(**changed)).loss
    if op == "stats":
        return sum(dgrpo.linear_token_stats(**given(**changed))[:3]).sum()
    return dgrpo.linear_logprobs(**given(**changed)).logprobs.sum()


def raises(error, argument, words, call, *args, **options):
    with pytest.raises(error) as raised:
        call(*args, **options)
    text = str(raised.value)
    assert re.match(rf"{re.escape(argument)}: got ", text), text
    assert all(word in text for word in words.split()), text


def topk(**changed):
    own = {
        "token_ids": torch.arange(4).expand(N, 4).contiguous(),
        "logprobs": torch.full((N, 4), -2.0),
    }
    return dgrpo.TopKTeacher(**{**own, **changed})


def head_teacher(**changed):
    return dgrpo.TeacherHead(
        **{"hidden": CASE.teacher_hidden, "weight": CASE.teacher_weight, **changed}
    )


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
    from contextlib import contextmanager

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


# -- modes and objectives ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["loss", "logprobs"])
def test_a_sequence_objective_belongs_to_stats(mode):
    raises(
        ValueError, "sequence_objective", f"mode {mode!r} 'stats'", HeadInputs,
        CASE.targets, mode=mode, sequence_objective=lambda s, c: s.logprobs,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["stats", "logprobs"])
def test_a_per_token_objective_belongs_to_loss(mode):
    raises(
        ValueError, "objective", f"mode {mode!r} 'loss'", HeadInputs,
        CASE.targets, mode=mode, objective=lambda s, c: s.logprobs,
    )  # fmt: skip


# -- dtypes, temperatures, second derivatives, numpy ---------------------------------------------


@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_a_teachers_states_are_never_rounded_in_silence(op):
    low = CASE.teacher_weight.bfloat16()
    raises(
        TypeError, "teacher.hidden", "torch.float32 torch.bfloat16", run, op,
        teacher=head_teacher(weight=low),
    )  # fmt: skip
    wide = run(op, teacher=head_teacher(hidden=CASE.teacher_hidden.bfloat16(), weight=low.float()))
    exact = CASE.teacher_hidden.bfloat16().float()
    assert torch.equal(wide, run(op, teacher=head_teacher(hidden=exact, weight=low.float())))


@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_autocast_casts_student_and_teacher(op):
    low = {"hidden": CASE.hidden.bfloat16(), "weight": CASE.weight.bfloat16()}
    theirs = head_teacher(
        hidden=CASE.teacher_hidden.bfloat16(), weight=CASE.teacher_weight.bfloat16()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(op, teacher=head_teacher())
        mixed = run(op, teacher=head_teacher(weight=CASE.teacher_weight.bfloat16()))
    want = run(op, teacher=theirs, **low)
    assert torch.equal(found, want) and torch.equal(mixed, want)


@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_the_temperature_of_log_probabilities_is_fixed(op):
    raises(
        ValueError, "teacher_temperature", "2.0 TopKTeacher", run, op,
        teacher=topk(), teacher_temperature=2.0,
    )  # fmt: skip
    assert run(op, teacher=topk(), teacher_temperature=1.0).isfinite()


@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_a_second_derivative_raises(op):
    loss = run(op)
    with pytest.raises(RuntimeError, match="create_graph: got True"):
        torch.autograd.grad(loss, CASE.weight, create_graph=True)
    loss = run(op)  # and the plain way still works, twice
    leaves = (CASE.hidden, CASE.weight)
    assert all(map(torch.equal, gradients(loss, *leaves), gradients(loss, *leaves)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", ["dgrpo", "loss", "stats"])
def test_numbers_of_numpy(op, backend):
    numbers = {
        "temperature": 0.5, "teacher_temperature": 2.0, "logit_scale": 0.5, "logit_softcap": 30.0,
        "jsd_beta": 0.25, "vocab_size": 90, "memory_budget": 2**18,
    }  # fmt: skip
    if op == "dgrpo":
        numbers |= {
            "clip_low": 0.125, "clip_high": 0.25, "clip_dual": 3.0, "teacher_coef": 0.5,
            "is_cap": 2.0, "entropy_coef": 0.0625, "ref_coef": 0.125,
        }  # fmt: skip

    def numpy(value):
        return np.int64(value) if isinstance(value, int) else np.float32(value)

    shared = {"teacher": head_teacher(), "divergence": "jsd", "backend": backend}
    shared["targets"] = CASE.targets.clamp(max=89)
    if op == "dgrpo":
        shared |= {"sampler_logprobs": CASE.old_logprobs, "ref_logprobs": CASE.old_logprobs}
    found = run(op, **shared, **{name: numpy(value) for name, value in numbers.items()})
    assert torch.equal(found, run(op, **shared, **numbers))
    for name in numbers:
        raises(TypeError, name, "bool", run, op, **{**shared, **numbers, name: np.bool_(True)})
    scaled = head_teacher(logit_scale=np.float32(0.5), logit_softcap=np.int64(20))
    assert run(op, **{**shared, "teacher": scaled}).isfinite()


def test_numpy_numbers_in_a_context():
    context = Context(
        CASE.advantages,
        torch.full((N,), 0.1),
        clip_dual=np.float64(3.0),
        clip_low=np.float32(0.25),
        teacher_coef=np.int64(1),
    )
    assert [type(v) for v in (context.clip_dual, context.clip_low)] == [float, float]
    assert type(context.teacher_coef) is int and context.clip_low == 0.25


@pytest.mark.parametrize("kind", ["full", "topk"])
def test_all_of_this_lets_good_calls_pass(kind):
    for op in ("dgrpo", "loss", "stats"):
        assert run(op, teacher=teacher_of(kind, CASE), check=True).isfinite()
