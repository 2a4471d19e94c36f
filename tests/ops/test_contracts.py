"""Calls that cannot be honoured raise by name; numbers of numpy are numbers."""

import numpy as np
import pytest
import torch

from dgrpo.head import HeadInputs
from dgrpo.objectives import Context
from tests.ops.cases import gradients
from tests.ops.contracts import CASE, N, head_teacher, raises, run, topk

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
