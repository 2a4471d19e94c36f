"""PolicyModel against Hugging Face's own logits and a plain loss, for every supported kind."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dgrpo.trainer.batch import pack
from dgrpo.trainer.policy import PolicyModel
from tests.tiny import (
    KINDS,
    SIZES,
    VOCAB,
    assert_same_gradients,
    make_samples,
    plain_logits,
    plain_loss,
    tiny_model,
    tiny_pair,
)

BACKBONE = ["q_proj", "v_proj", "down_proj"]


def policy_loss(policy, samples, max_tokens=30, **packing):
    """The loss over all micros, with gradients accumulated."""
    total = 0.0
    for micro in pack(samples, max_tokens, teacher_coef=0.0, **packing):
        out = policy(micro, inputs=micro.head_inputs())
        out.loss.backward()
        total += float(out.loss.detach())
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_plain_logits(kind):
    moe = kind == "qwen3_moe"  # its grouped product has no fp64
    policy, plain = tiny_pair(kind, dtype=torch.float32 if moe else torch.float64)
    samples = make_samples(SIZES)
    want = plain_loss(plain, samples)
    want.backward()
    got = policy_loss(policy, samples)
    assert abs(got - float(want.detach())) < 5e-6  # HF computes norms and softmax in fp32
    assert_same_gradients(policy, plain, 1e-4 if moe else 1e-5)


@pytest.mark.parametrize(
    "kind, lora",
    [
        ("llama", BACKBONE),
        ("llama", [*BACKBONE, "lm_head"]),
        ("qwen3", BACKBONE),
        ("qwen3", ["q_proj", "lm_head"]),  # tied
        ("gemma2", ["q_proj", "lm_head"]),  # tied, soft cap
        ("phi_biased_head", ["q_proj", "lm_head"]),
    ],
)
def test_lora_trains_its_matrices_alone_and_alike(kind, lora):
    policy, plain = tiny_pair(kind, lora=lora)
    samples = make_samples(SIZES)
    want = plain_loss(plain, samples)
    want.backward()
    got = policy_loss(policy, samples)
    assert abs(got - float(want.detach())) < 1e-5
    assert policy.adapted_head == ("lm_head" in lora)
    trained = [n for n, p in policy.named_parameters() if p.grad is not None]
    assert trained and all(".lora_" in name for name in trained)
    assert_same_gradients(policy, plain, 1e-4)


def test_masked_tokens_and_prompts_are_no_rows():
    policy, plain = tiny_pair("qwen2")
    samples = make_samples(SIZES)
    (micro,) = pack(samples, 100)
    out = policy(micro, inputs=micro.head_inputs())
    assert len(micro.rows) == sum(int(s.mask.sum()) for s in samples) < micro.targets.numel()
    for index, values in micro.per_sample(out.logprobs):
        sample = samples[index]
        logp = torch.log_softmax(plain_logits(plain, sample), -1)
        want = logp.gather(-1, sample.completion_ids[:, None])[:, 0] * sample.mask
        torch.testing.assert_close(values, want.detach(), rtol=1e-5, atol=1e-5)
    outside = torch.ones(micro.targets.numel(), dtype=torch.bool)
    outside[micro.rows] = False
    assert not out.logprobs[outside].any()


def test_scoring_mode_has_no_gradient_and_needs_no_weights():
    policy, plain = tiny_pair("cohere")
    samples = make_samples(SIZES, token_weights=None, old_logprobs=None)
    (micro,) = pack(samples, 100)
    out = policy(micro, inputs=micro.head_inputs("logprobs"))
    assert out.loss is None and not out.logprobs.requires_grad
    logp = torch.log_softmax(plain_logits(plain, samples[2]), -1)
    want = logp.gather(-1, samples[2].completion_ids[:, None])[:, 0] * samples[2].mask
    got = dict(micro.per_sample(out.logprobs))[2]
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-5)


def test_parameters_are_shared_and_keep_their_names():
    model = tiny_model("qwen3")
    names = [name for name, _ in model.named_parameters()]
    weight = model.lm_head.weight
    policy = PolicyModel(model)
    assert policy.head.weight is weight and policy.tied
    assert [n for n, _ in policy.named_parameters()] == [f"model.{name}" for name in names]
    assert (policy.vocab_size, policy.hidden_size) == (VOCAB, 32)
    assert len(policy.layers) == 2 and not policy.adapted_head


def test_models_that_cannot_be_packed_raise():
    with pytest.raises(TypeError, match="model: got Linear, expected an AutoModelForCausalLM"):
        PolicyModel(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected an AutoModelForCausalLM"):
        PolicyModel(tiny_model("llama").model)
    hybrid = tiny_model("llama")
    hybrid.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"layers of type \['linear_attention'\]"):
        PolicyModel(hybrid)


def test_a_model_used_past_the_policy_raises():
    policy = PolicyModel(tiny_model("llama"))
    with pytest.raises(RuntimeError, match="call the model through PolicyModel"):
        policy.model(torch.ones(1, 4, dtype=torch.int64))


def test_an_exported_configuration_names_no_attention_of_ours(tmp_path):
    policy = PolicyModel(tiny_model("qwen2"))
    policy.model.save_pretrained(tmp_path)
    assert "dgrpo" not in (tmp_path / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path)(torch.ones(1, 4, dtype=torch.int64))


def test_gathered_sets_evaluation_and_restores_training():
    policy = PolicyModel(tiny_model("llama")).train()
    with policy.gathered():
        assert not policy.model.training
    assert policy.model.training
