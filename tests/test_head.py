"""`FusedHead`: losses inside a module's own forward, equal to the ops that it calls."""

from dataclasses import dataclass, fields

import pytest
import torch
from torch import nn

import dgrpo
from dgrpo import objectives
from dgrpo.head import FusedHead, HeadInputs, HeadOutput
from dgrpo.objectives import Context, padded_sequence_ids
from dgrpo.ops import Options
from dgrpo.testing import oracle, relative_error
from tests.ops.cases import case_of, fp64, gradients, teacher_of


@pytest.fixture
def case():
    return fp64(case_of(24))


def head_of(case, **options):
    linear = nn.Linear(16, 101, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(case.weight)
    return FusedHead.from_linear(linear, **options)


def context_of(case, **options):
    weights = torch.full_like(case.advantages, 1 / int((case.targets != -100).sum()))
    return Context(case.advantages, weights, old_logprobs=case.old_logprobs, **options)


def test_it_is_a_linear_layer_with_the_same_parameters():
    linear = nn.Linear(4, 7).eval()
    head = FusedHead.from_linear(linear)
    assert isinstance(head, nn.Linear) and not head.training
    assert head.weight is linear.weight and head.bias is linear.bias
    assert set(head.state_dict()) == {"weight", "bias"}
    x = torch.randn(2, 3, 4)
    assert torch.equal(head(x), linear(x))
    assert FusedHead.from_linear(nn.Linear(4, 7, bias=False)).bias is None


def test_tied_embeddings_stay_tied():
    embedding = nn.Embedding(7, 4)
    linear = nn.Linear(4, 7, bias=False)
    linear.weight = embedding.weight
    assert FusedHead.from_linear(linear).weight is embedding.weight


def test_plain_logits_are_scaled_and_capped():
    head = FusedHead.from_linear(nn.Linear(4, 7), logit_scale=0.5, logit_softcap=3.0)
    x = torch.randn(5, 4)
    want = 3 * torch.tanh(nn.functional.linear(x, head.weight, head.bias) * 0.5 / 3)
    torch.testing.assert_close(head(x), want)


def test_the_fused_loss(case):
    head = head_of(case, logit_scale=0.7, logit_softcap=20.0)
    teacher = teacher_of("full", case)
    inputs = HeadInputs(
        case.targets,
        context=context_of(case, teacher_coef=0.3, clip_high=0.4),
        options=Options(teacher, divergence="forward_kl", temperature=0.8, memory_budget=9000),
    )
    out = head(case.hidden, inputs)
    assert isinstance(out, HeadOutput) and set(out.metrics) == {"ratio", "clipped", "clamped"}
    want = oracle(
        case.hidden, head.weight, case.targets, case.advantages, bias=head.bias, teacher=teacher,
        old_logprobs=case.old_logprobs, teacher_coef=0.3, clip_high=0.4, logit_scale=0.7,
        logit_softcap=20.0, divergence="forward_kl", temperature=0.8,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, want.loss)
    got = gradients(out.loss, case.hidden, head.weight, head.bias)
    for value, wanted in zip(got, (want.d_hidden, want.d_weight, want.d_bias), strict=True):
        assert relative_error(value, wanted) < 1e-9


def test_a_plain_objective_equals_the_fused_one(case):
    head, context, teacher = head_of(case), context_of(case), teacher_of("full", case)
    fused, plain = (
        head(
            case.hidden,
            HeadInputs(case.targets, context=context, objective=f, options=Options(teacher)),
        )
        for f in (None, objectives.dgrpo)
    )
    torch.testing.assert_close(fused.loss, plain.loss)
    assert set(fused.metrics) == set(plain.metrics)
    pairs = (gradients(out.loss, case.hidden, head.weight) for out in (fused, plain))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


def test_statistics_and_a_sequence_objective(case):
    head, context = head_of(case), context_of(case)
    ids = padded_sequence_ids((case.targets != -100).view(2, 12))

    def gspo(stats, context):
        return objectives.gspo(stats, context, ids)

    teacher = teacher_of("topk", case)
    options = Options(teacher)
    stats = head(case.hidden, HeadInputs(case.targets, mode="stats", options=options))
    assert stats.loss is None and stats.logprobs.requires_grad
    inputs = HeadInputs(case.targets, "stats", context, sequence_objective=gspo, options=options)
    out = head(case.hidden, inputs)
    losses, _ = gspo(
        dgrpo.linear_token_stats(case.hidden, head.weight, case.targets, teacher, bias=head.bias),
        context,
    )
    torch.testing.assert_close(out.loss, losses.sum())
    assert out.metrics and gradients(out.loss, head.weight)[0].norm() > 0


def test_scoring(case):
    head = head_of(case)
    inputs = HeadInputs(case.targets, mode="logprobs", options=Options(divergence="jsd"))
    out = head(case.hidden, inputs)
    want = dgrpo.linear_logprobs(case.hidden, head.weight, case.targets, bias=head.bias)
    assert torch.equal(out.logprobs, want.logprobs) and torch.equal(out.entropy, want.entropy)
    assert out.loss is None and out.divergence is None and not out.logprobs.requires_grad


def test_rows_are_passed_on(case):
    head = head_of(case)
    rows = (case.targets != -100).nonzero()[:, 0]
    some = HeadInputs(case.targets, mode="logprobs", options=Options(rows=rows[:3]))
    assert head(case.hidden, some).logprobs.nonzero()[:, 0].tolist() == rows[:3].tolist()


def test_an_adapter_on_the_head_gets_its_gradient(case):
    class Adapted(FusedHead):
        def merged_weight(self):
            return self.weight + self.up @ self.down

    head = Adapted(16, 101, dtype=torch.float64)
    head.weight.requires_grad_(False)
    head.up = nn.Parameter(torch.randn(101, 2, dtype=torch.float64))
    head.down = nn.Parameter(torch.randn(2, 16, dtype=torch.float64))
    out = head(case.hidden, HeadInputs(case.targets, context=context_of(case)))
    out.loss.backward()
    merged = (head.weight + head.up @ head.down).detach()
    want = oracle(
        case.hidden, merged, case.targets, case.advantages, old_logprobs=case.old_logprobs
    )
    assert relative_error(head.up.grad, want.d_weight @ head.down.detach().T) < 1e-9
    assert head.weight.grad is None


@pytest.mark.parametrize(
    "inputs, error, words",
    [
        ({"mode": "score"}, ValueError, "mode: got 'score', expected one of loss, stats, logprobs"),
        ({}, TypeError, "context: got NoneType, expected Context for mode 'loss'"),
        (
            {"mode": "logprobs", "options": {"temperature": 1.0}},
            TypeError,
            "options: got dict, expected Options",
        ),
        (
            {"mode": "stats", "sequence_objective": lambda stats, context: 0},
            TypeError,
            "context: got NoneType, expected Context for mode 'stats'",
        ),
    ],
    ids=["mode", "context", "options", "context of a sequence objective"],
)
def test_bad_inputs(case, inputs, error, words):
    with pytest.raises(error, match=words):
        head_of(case)(case.hidden, HeadInputs(case.targets, **inputs))


@dataclass(frozen=True)
class Gated(Context):
    """A context with a field of one's own."""

    gate: torch.Tensor | None = None  # (N,)


@pytest.mark.parametrize("objective", [None, lambda stats, context: -context.gate * stats.logprobs])
def test_a_new_field_of_the_context_needs_no_other_change(case, objective):
    plain = context_of(case)
    gated = Gated(**{f.name: getattr(plain, f.name) for f in fields(plain)}, gate=torch.rand(24))
    head = head_of(case)
    out = head(case.hidden, HeadInputs(case.targets, context=gated, objective=objective))
    if objective is None:
        want = head(case.hidden, HeadInputs(case.targets, context=plain)).loss
    else:
        want = -(gated.gate * out.logprobs).sum()  # masked tokens have a log-probability of 0
    assert torch.allclose(out.loss, want)


def test_from_something_else():
    with pytest.raises(TypeError, match="linear: got Embedding, expected nn.Linear"):
        FusedHead.from_linear(nn.Embedding(3, 4))
