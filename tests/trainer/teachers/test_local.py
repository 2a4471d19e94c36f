"""Teachers: their hidden states, the loss with each kind, and a server on this machine."""

import pytest
import torch

from dgrpo.trainer.batch import filler, pack
from dgrpo.trainer.policy import PolicyModel
from dgrpo.trainer.teachers.local import SelfTeacher, Teacher
from tests.tiny import (
    SIZES,
    VOCAB,
    assert_same_gradients,
    loss_with,
    make_groups,
    make_samples,
    plain_loss,
    relative,
    teacher_samples,
    tiny_model,
    tiny_pair,
)

WIDE = {"hidden_size": 48, "vocab_size": VOCAB + 16}  # padded further than the student's


@pytest.mark.parametrize(
    "student, kind, changes",
    [
        ("qwen3", "qwen3", {}),
        ("qwen3", "llama", WIDE),
        ("gemma2", "phi_biased_head", WIDE),
        ("llama", "gemma3", {"hidden_size": 48}),
        ("cohere", "granite", WIDE),
        ("granite", "cohere", {}),
    ],
)
def test_the_loss_is_that_of_both_models_logits(student, kind, changes):
    policy, plain = tiny_pair(student)
    model = tiny_model(kind, seed=3, **changes)
    teacher = Teacher(PolicyModel(tiny_model(kind, seed=3, **changes)))
    samples = teacher_samples()
    want = plain_loss(plain, samples, teacher=model)
    want.backward()
    got = loss_with(policy, samples, teacher, vocab_size=VOCAB)
    assert abs(got - float(want.detach())) < 2e-5 * max(1, abs(float(want.detach())))
    assert_same_gradients(policy, plain)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())


def test_hidden_states_are_kept_for_guided_tokens_alone():
    model = tiny_model("qwen2", seed=3)
    body = tiny_model("qwen2", seed=3).model
    teacher = Teacher(PolicyModel(model))
    samples = teacher_samples()
    teacher.attach(samples, 25)
    assert len(teacher.hidden) == sum(int(s.guided.sum()) for s in samples)
    assert not teacher.hidden.requires_grad
    for sample in samples:
        assert torch.equal(sample.teacher_rows >= 0, sample.guided)
        own = sample.teacher_prompt_ids
        prompt = sample.prompt_ids if own is None else own
        ids = torch.cat([prompt, sample.completion_ids])
        want = body(ids[None]).last_hidden_state[0, len(prompt) - 1 : -1][sample.guided]
        got = teacher.hidden[sample.teacher_rows[sample.guided]]
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def test_the_size_of_a_pass_does_not_matter():
    teacher = Teacher(PolicyModel(tiny_model("gemma3", seed=3)))
    kept = []
    for max_tokens in (1, 25, 1000):
        teacher.attach(teacher_samples(), max_tokens)
        kept.append(teacher.hidden)
    assert relative(kept[0], kept[1]) < 1e-5 and relative(kept[0], kept[2]) < 1e-5


@pytest.mark.parametrize("own_prompts", ["none", "each", "one"])
def test_a_prompt_is_read_once_for_all_of_its_completions(own_prompts, monkeypatch):
    teacher = Teacher(PolicyModel(tiny_model("gemma3", seed=3)))
    read, run = [], teacher.model.hidden_states

    def counted(micro):
        read.append(micro.input_ids.numel())
        return run(micro)

    monkeypatch.setattr(teacher.model, "hidden_states", counted)
    kept, totals = [], []
    for share in (True, False):
        samples = make_groups([(9, (5, 1, 8)), (4, (6, 2))])
        for sample in samples:  # shared within a group, or one sample's alone
            if own_prompts == "each" or (own_prompts == "one" and sample.index == 1):
                number = sample.group if own_prompts == "each" else 1
                sample.teacher_prompt_ids = torch.arange(5, 12 + number)
        read.clear()
        teacher.attach(samples, 1000, share_prompts=share)
        kept.append(teacher.hidden)
        totals.append(sum(read))
    assert relative(*kept) < 1e-5
    assert totals[0] == totals[1] - {"none": 2 * 8 + 3, "each": 2 * 6 + 7, "one": 8}[own_prompts]


def test_the_loss_with_a_teacher_and_shared_prompts():
    policies = [tiny_pair("qwen3")[0] for _ in range(2)]
    teacher = Teacher(PolicyModel(tiny_model("gemma3", seed=3)))
    got, want = (
        loss_with(policy, make_groups(), teacher, 40, share_prompts=share)
        for policy, share in zip(policies, (True, False), strict=True)
    )
    assert got == pytest.approx(want, rel=1e-5)
    assert_same_gradients(policies[0], policies[1].model)


def test_a_next_batch_takes_the_place_of_the_last():
    teacher = Teacher(PolicyModel(tiny_model("llama")), offload_body=True)
    teacher.attach(make_samples(SIZES), 25)
    samples = make_samples([(4, 3)], loss_mask=torch.ones(3, dtype=torch.bool))
    teacher.attach(samples, 25)
    assert len(teacher.hidden) == 3 and samples[0].teacher_rows.tolist() == [0, 1, 2]
    teacher.attach([], 25)
    assert len(teacher.hidden) == 0


def test_a_micro_without_the_teachers_tokens_has_an_empty_head():
    policy, _ = tiny_pair("llama")
    teacher = Teacher(PolicyModel(tiny_model("llama", seed=3)))
    samples = make_samples([(3, 4)])
    samples[0].teacher_mask = torch.zeros(4, dtype=torch.bool)
    teacher.attach(samples, 25)
    for micro in (*pack(samples, 25), filler()):
        head = teacher.head(micro)
        assert len(teacher.hidden) == 0 and (head.rows == -1).all()
        out = policy(micro, inputs=micro.head_inputs(teacher=head))
        out.loss.backward()
        assert not out.divergence.any() and torch.isfinite(out.loss)


def test_a_bf16_teacher_stays_bf16():
    teacher = Teacher(PolicyModel(tiny_model("qwen3", seed=3, dtype=torch.bfloat16)))
    policy, _ = tiny_pair("qwen3")
    samples = teacher_samples()
    got = loss_with(policy, samples, teacher)
    assert teacher.hidden.dtype == torch.bfloat16
    exact = Teacher(PolicyModel(tiny_model("qwen3", seed=3)))
    assert abs(got - loss_with(policy, samples, exact)) < 0.02 * abs(got)


# The policy as its own teacher.


def test_the_policy_on_another_prompt_is_a_constant():
    policy, plain = tiny_pair("gemma3")
    samples = teacher_samples()
    want = plain_loss(plain, samples, teacher=tiny_model("gemma3"))  # the same weights
    want.backward()
    policy.train()
    got = loss_with(policy, samples, SelfTeacher(policy))
    assert policy.model.training
    assert abs(got - float(want.detach())) < 1e-5
    assert_same_gradients(policy, plain)


def test_the_policy_on_the_same_prompt_teaches_nothing():
    policy, _ = tiny_pair("qwen2")
    samples = make_samples(SIZES, advantages=None)
    assert abs(loss_with(policy, samples, SelfTeacher(policy))) < 1e-6


def test_the_head_moves_with_the_policy():
    policy, _ = tiny_pair("phi_biased_head")
    teacher = SelfTeacher(policy)
    samples = teacher_samples()
    teacher.attach(samples, 25)
    before = [t.clone() for t in (policy.head.weight, policy.head.bias)]
    with torch.no_grad():
        policy.head.weight.add_(1.0)
        policy.head.bias.add_(1.0)
    (micro, *_) = pack(samples, 25)
    with teacher.head(micro).open() as now:
        assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        assert not any(t.requires_grad for t in now)


def test_a_self_teacher_with_lora_has_the_merged_head():
    policy, _ = tiny_pair("llama", lora=["lm_head"])
    (micro,) = pack(make_samples([(3, 4)]), 25)
    with SelfTeacher(policy).head(micro).open() as (weight, bias):
        assert torch.equal(weight, policy.head.merged_weight()) and bias is None
        assert not torch.equal(weight, policy.head.weight) and not weight.requires_grad
