"""The oracle against cases worked out by hand, so that it can be wrong; and the peaked inputs."""

import math
from types import SimpleNamespace

import pytest
import torch

from dgrpo.testing import near_equal_teacher, oracle, oracle_stats, peaked_case, relative_error

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
ONE = torch.ones(1, 1, dtype=torch.float64)
Y = torch.tensor([0])


def full_teacher(q=Q, **fields):
    given = {"bias": None, "logit_scale": 1.0, "logit_softcap": None, "rows": None}
    return SimpleNamespace(hidden=ONE, weight=q.log()[:, None], **{**given, **fields})


def top_teacher(ids, q, target=None):
    target = None if target is None else torch.tensor([math.log(target)])
    return SimpleNamespace(
        token_ids=torch.tensor([ids]),
        logprobs=torch.tensor([q], dtype=torch.float64).log(),
        target_logprobs=target,
    )


def one_token(advantage=0.0, logits=None, **options):
    """The oracle on one token whose student distribution is P (or softmax of `logits`)."""
    logits = P.log() if logits is None else torch.tensor(logits, dtype=torch.float64)
    options.setdefault("teacher_coef", 0.0)
    return oracle(ONE, logits[:, None], Y, torch.tensor([advantage]), **options)


DIVERGENCES = {
    "reverse_kl": 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3),
    "forward_kl": 0.2 * math.log(0.4) + 0.2 * math.log(2 / 3) + 0.6 * math.log(3),
    "clipped_forward_kl": 0.2 * math.log(0.4) + 0.2 * math.log(2 / 3) + 0.1,
    # M = 0.75 P + 0.25 Q = (0.425, 0.275, 0.3)
    "jsd": 0.25 * (0.2 * math.log(0.2 / 0.425) + 0.2 * math.log(0.2 / 0.275) + 0.6 * math.log(2))
    + 0.75
    * (0.5 * math.log(0.5 / 0.425) + 0.3 * math.log(0.3 / 0.275) + 0.2 * math.log(0.2 / 0.3)),
    # 0.2 Q - 0.8 P = (-0.36, -0.2, -0.04)
    "jeffreys": -0.36 * math.log(0.4) - 0.2 * math.log(2 / 3) - 0.04 * math.log(3),
}
PARAMETERS = {"divergence_clip": 0.1, "jsd_beta": 0.25, "jeffreys_weight": 0.2}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_by_hand(name):
    options = {"divergence": name, **PARAMETERS}
    got = one_token(teacher=full_teacher(), teacher_coef=1.0, **options)
    assert got.divergence.item() == pytest.approx(DIVERGENCES[name], abs=1e-12)
    assert got.loss.item() == pytest.approx(DIVERGENCES[name], abs=1e-12)
    assert got.logprobs.item() == pytest.approx(math.log(0.5))
    assert got.teacher_logprobs.item() == pytest.approx(math.log(0.2))


def closed_form_gradients():
    """dD/dz of each divergence, as the kernels compute it."""
    log_ratio = (P / Q).log()
    mixed = 0.75 * P + 0.25 * Q
    to_mixed = (P / mixed).log()
    unclipped = Q * -log_ratio < 0.1
    return {
        "reverse_kl": P * (log_ratio - (P * log_ratio).sum()),
        "forward_kl": P - Q,
        "clipped_forward_kl": P * Q[unclipped].sum() - Q * unclipped,
        "jsd": 0.75 * P * (to_mixed - (P * to_mixed).sum()),
        "jeffreys": 0.2 * (P - Q) + 0.8 * P * (log_ratio - (P * log_ratio).sum()),
    }


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_gradient_has_its_closed_form(name):
    options = {"divergence": name, **PARAMETERS}
    got = one_token(teacher=full_teacher(), teacher_coef=1.0, **options)
    torch.testing.assert_close(got.d_weight[:, 0], closed_form_gradients()[name])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_with_every_token_but_one_is_the_full_divergence(name):
    options = {"divergence": name, **PARAMETERS, "teacher_coef": 1.0}
    teacher = top_teacher([2, -1, 0], [0.6, 0.1, 0.2])  # token 1 is the tail; the -1 is ignored
    got, want = one_token(teacher=teacher, **options), one_token(teacher=full_teacher(), **options)
    assert got.divergence.item() == pytest.approx(want.divergence.item(), abs=1e-7)
    torch.testing.assert_close(got.d_weight, want.d_weight, atol=1e-6, rtol=0)
    assert got.teacher_logprobs.item() == pytest.approx(math.log(0.2))


def test_top_k_tail_by_hand():
    got = one_token(teacher=top_teacher([2], [0.6], target=0.2), teacher_coef=1.0)
    want = 0.2 * math.log(0.2 / 0.6) + 0.8 * math.log(0.8 / 0.4)
    assert got.divergence.item() == pytest.approx(want, abs=1e-12)
    # dD/dz = p (r_bucket - D) over the whole vocabulary
    r = torch.tensor([math.log(2), math.log(2), math.log(1 / 3)], dtype=torch.float64)
    torch.testing.assert_close(got.d_weight[:, 0], P * (r - want))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_of_the_whole_vocabulary_has_no_tail(name):
    options = {"divergence": name, **PARAMETERS, "teacher_coef": 1.0}
    got = one_token(teacher=top_teacher([0, 1, 2], [0.2, 0.2, 0.6]), **options)
    assert got.divergence.item() == pytest.approx(DIVERGENCES[name], abs=1e-12)
    torch.testing.assert_close(got.d_weight[:, 0], closed_form_gradients()[name])


def test_top_k_target_outside_reads_the_tail():
    got = one_token(teacher=top_teacher([2, -1], [0.6, 1.0]))
    assert got.teacher_logprobs.item() == pytest.approx(math.log(0.4))


# name: (advantage, options, loss, dloss/dlogp, clipped), where logp = log 0.5
POLICY = {
    "on-policy ratio is 1": (2.0, {}, -2.0, -2.0, False),
    "inside": (1.0, {"old_logprobs": math.log(0.45)}, -10 / 9, -10 / 9, False),
    "clipped above": (1.0, {"old_logprobs": math.log(0.4)}, -1.2, 0.0, True),
    "below is not clipped for A > 0": (1.0, {"old_logprobs": 0.0}, -0.5, -0.5, False),
    "clipped below": (-1.0, {"old_logprobs": 0.0}, 0.8, 0.0, True),
    "above is not clipped for A < 0": (-1.0, {"old_logprobs": math.log(0.1)}, 5.0, 5.0, False),
    "dual clip": (-1.0, {"old_logprobs": math.log(0.1), "clip_dual": 3.0}, 3.0, 0.0, True),
    "weighted": (1.0, {"policy_weights": 0.25, "token_weights": 4.0}, -1.0, -1.0, False),
    "sampler": (1.0, {"sampler_logprobs": math.log(0.25)}, -2.0, -2.0, False),
    "capped": (1.0, {"sampler_logprobs": math.log(0.25), "is_cap": 1.5}, -1.5, -1.5, False),
    "k3": (0.0, {"ref_logprobs": 0.0, "ref_coef": 3.0}, 3 - 3 * math.log(2), -3.0, False),
}


@pytest.mark.parametrize("name", POLICY)
def test_policy_term_by_hand(name):
    advantage, options, loss, slope, clipped = POLICY[name]
    per_token = {"old_logprobs", "ref_logprobs", "sampler_logprobs", "policy_weights"}
    options = {k: torch.tensor([v]) if k in per_token else v for k, v in options.items()}
    got = one_token(advantage, **options)
    assert got.loss.item() == pytest.approx(loss, abs=1e-6)
    # dlogp/dz = (1[v = y] - p)
    want = slope * (torch.tensor([1.0, 0.0, 0.0]) - P)
    torch.testing.assert_close(got.d_weight[:, 0], want, atol=1e-6, rtol=0)
    assert got.clipped.item() is clipped


def test_log_ratio_is_clamped_at_20_without_gradient():
    got = one_token(-1.0, old_logprobs=torch.tensor([-30.0]))
    assert got.ratio.item() == pytest.approx(math.exp(20))
    assert got.clamped.item() and got.d_weight.abs().max() == 0


def test_infinite_ratio_without_advantage_is_nothing():
    got = one_token(0.0, old_logprobs=torch.tensor([-math.inf]))
    assert got.loss == 0 and got.d_weight.abs().max() == 0


def test_entropy_by_hand():
    entropy = -(P * P.log()).sum()
    got = one_token(entropy_coef=2.0)
    torch.testing.assert_close(got.entropy[0], entropy)
    torch.testing.assert_close(got.d_weight[:, 0], 2 * P * (P.log() + entropy))


def test_bias_scale_softcap_temperature_in_this_order():
    weight = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
    bias = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
    options = {"logit_scale": 2.0, "logit_softcap": 3.0, "temperature": 0.5}
    stats = oracle_stats(ONE, weight, Y, bias=bias, **options)
    z = [3 * math.tanh(2 * (w + b) / 3) / 0.5 for w, b in ((1, 0.5), (2, 0), (-1, 0))]
    want = z[0] - math.log(sum(map(math.exp, z)))
    assert stats.logprobs.item() == pytest.approx(want, abs=1e-12)


def test_teacher_has_its_own_scale_softcap_and_temperature():
    teacher = full_teacher(logit_scale=2.0, logit_softcap=3.0, bias=torch.tensor([0.1, 0.0, 0.0]))
    stats = oracle_stats(ONE, P.log()[:, None], Y, teacher, teacher_temperature=2.0)
    t = [3 * math.tanh(2 * (math.log(q) + b) / 3) / 2 for q, b in ((0.2, 0.1), (0.2, 0), (0.6, 0))]
    want = t[0] - math.log(sum(map(math.exp, t)))
    assert stats.teacher_logprobs.item() == pytest.approx(want, abs=1e-8)


def test_vocab_size_drops_the_columns_beyond():
    long = torch.cat([P, torch.tensor([7.0])])
    got = one_token(logits=long.log().tolist(), vocab_size=3, teacher=full_teacher(long))
    assert got.logprobs.item() == pytest.approx(math.log(0.5))
    assert got.d_weight.shape == (4, 1) and got.d_weight[3] == 0


def test_masked_tokens_and_tokens_without_teacher_take_no_part():
    hidden = ONE.expand(3, 1)
    teacher = full_teacher(rows=torch.tensor([0, -1, 0]))
    targets = torch.tensor([0, 1, -100])
    got = oracle(hidden, P.log()[:, None], targets, torch.zeros(3), teacher=teacher)
    want = torch.tensor([DIVERGENCES["reverse_kl"], 0, 0], dtype=torch.float64)
    torch.testing.assert_close(got.divergence, want)
    torch.testing.assert_close(got.loss, 0.5 * want.sum() / 2)  # beta, mean of the two unmasked
    assert got.logprobs[2] == 0 and got.d_hidden[2] == 0


def test_teacher_coefficient_per_token_and_batch_shapes():
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    weight = torch.randn(5, 4, dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2], [3, -100, 4]])
    teacher = full_teacher()
    teacher.hidden, teacher.weight = hidden.roll(1, 0), weight
    coef = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    options = {"token_weights": torch.ones(2, 3), "teacher": teacher, "teacher_coef": coef}
    got = oracle(hidden, weight, targets, torch.zeros(2, 3), **options)
    torch.testing.assert_close(got.loss, got.divergence[0, 1])
    assert got.d_hidden.shape == hidden.shape and got.divergence[1, 1] == 0


def test_rounded_policy_logits_move_the_policy_term_only():
    logits = [30.06, 29.97, 28.0]  # bf16: 30.0, 30.0, 28.0
    teacher = full_teacher()
    exact, rounded = (
        one_token(1.0, logits, policy_logits=kind, teacher=teacher)
        for kind in ("float32", "bfloat16")
    )
    want = -math.log(2 + math.exp(-2))
    assert rounded.logprobs.item() == pytest.approx(want, abs=1e-12)
    assert abs(exact.logprobs.item() - want) > 0.01
    assert rounded.entropy == exact.entropy and rounded.divergence == exact.divergence
    p = torch.tensor([1, 1, math.exp(-2)], dtype=torch.float64) / (2 + math.exp(-2))
    torch.testing.assert_close(rounded.d_weight[:, 0], p - torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_bias_of_minus_infinity_forbids_its_token(softcap):
    logits = torch.tensor([0.4, -0.7, 0.1], dtype=torch.float64)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    p = capped[:2].softmax(0)
    bias, q = torch.tensor([0.0, 0.0, -math.inf]), Q
    want = {
        "reverse_kl": (p * (p / q[:2]).log()).sum(),
        "clipped_forward_kl": (q[:2] * (q[:2] / p).log()).clamp(max=0.1).sum() + 0.1,
        "forward_kl": torch.tensor(math.inf),
    }
    for name, value in want.items():
        got = one_token(
            1.0, logits.tolist(), bias=bias, teacher=full_teacher(), teacher_coef=1.0,
            divergence=name, divergence_clip=0.1, logit_softcap=softcap, entropy_coef=0.1,
        )  # fmt: skip
        assert got.divergence.item() == pytest.approx(value.item(), abs=1e-12)
        assert got.logprobs.item() == pytest.approx(p[0].log().item(), abs=1e-12)
        assert got.entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-12)
        assert got.d_weight.isfinite().all() and got.d_weight[2] == got.d_bias[2] == 0


def test_a_token_that_the_teacher_forbids_counts_as_a_million_nats_below_its_peak():
    q = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    got = one_token(teacher=full_teacher(q), teacher_coef=1.0).divergence.item()
    assert got == pytest.approx(0.2e6, rel=1e-4)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="divergence: got 'kl'"):
        one_token(teacher=full_teacher(), divergence="kl")
    with pytest.raises(ValueError, match="sampler_logprobs: got both"):
        one_token(policy_weights=ONE[0], sampler_logprobs=ONE[0])
    with pytest.raises(ValueError, match=r"got: got shape \(2,\), expected \(3,\)"):
        relative_error(torch.ones(2), torch.ones(3))


def test_relative_error():
    want = torch.tensor([3.0, 4.0])
    assert relative_error(want + torch.tensor([0.0, 0.5]), want) == pytest.approx(0.1)
    assert relative_error(want, torch.zeros(2)) == pytest.approx(5.0)
    assert math.isnan(relative_error(torch.tensor([1.0, math.nan]), want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked_case_is_peaked(dtype):
    case = peaked_case(128, 48, 1000, teacher_width=64, dtype=dtype, masked=0.25)
    logits = case.hidden.double() @ case.weight.double().T
    top = logits.softmax(-1).amax(-1)
    assert 0.45 < top.min() and top.max() < 0.995 and 0.6 < top.median() < 0.9
    assert 20 < logits.amax(-1).min() and logits.amax(-1).max() < 37
    assert case.teacher_hidden.shape == (128, 64) and case.teacher_weight.shape == (1000, 64)
    assert 15 < (case.targets == -100).sum() < 50
    again = peaked_case(128, 48, 1000, teacher_width=64, dtype=dtype, masked=0.25)
    assert all(map(torch.equal, case, again))


def test_near_equal_teacher_has_the_kl_asked_for():
    case = peaked_case(64, 48, 1000, dtype=torch.bfloat16)
    hidden, weight = near_equal_teacher(case.hidden, case.weight, kl=0.01)
    assert hidden.dtype == torch.bfloat16
    teacher = full_teacher()
    teacher.hidden, teacher.weight = hidden, weight
    kl = oracle_stats(case.hidden, case.weight, case.targets, teacher).divergence
    assert kl.mean().item() == pytest.approx(0.01, rel=0.05)
