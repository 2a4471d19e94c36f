"""PolicyModel against Hugging Face's own logits and a plain loss, for every supported kind."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dgrpo.head import FusedHead
from dgrpo.trainer.batch import pack
from dgrpo.trainer.policy import LoraHead, PolicyModel, apply_liger, fp32_logits
from dgrpo.trainer.policy.load import liger_options
from tests.tiny import (
    KINDS,
    SIZES,
    VOCAB,
    assert_same_gradients,
    make_samples,
    plain_logits,
    plain_loss,
    relative,
    tiny_model,
    tiny_pair,
)

BACKBONE = ["q_proj", "v_proj", "down_proj"]


def policy_loss(policy, samples, max_tokens=30, **packing):
    """The loss over all micros, with gradients accumulated."""
    total = 0.0
    for micro in pack(samples, max_tokens, teacher_coef=0.0, **packing):
        out = policy(**micro.model_args(), inputs=micro.head_inputs())
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
    out = policy(**micro.model_args(), inputs=micro.head_inputs())
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
    out = policy(**micro.model_args(), inputs=micro.head_inputs("logprobs"))
    assert out.loss is None and not out.logprobs.requires_grad
    logp = torch.log_softmax(plain_logits(plain, samples[2]), -1)
    want = logp.gather(-1, samples[2].completion_ids[:, None])[:, 0] * samples[2].mask
    got = dict(micro.per_sample(out.logprobs))[2]
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma3", "granite", "cohere", "phi_biased_head"])
def test_logits_for_sampling_are_the_models_own(kind):
    policy, plain = tiny_pair(kind)
    (sample,) = make_samples([(4, 9)])
    (micro,) = pack([sample], 100)
    hidden = policy.hidden_states(**micro.model_args())
    got = fp32_logits(policy.head, hidden[3:])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain_logits(plain, sample).detach(), rtol=1e-4, atol=1e-5)


def test_logits_of_a_bf16_head_are_not_rounded_to_bf16():
    torch.manual_seed(0)
    head = FusedHead(64, 500, dtype=torch.bfloat16)
    hidden = torch.randn(5, 64).bfloat16()
    got = fp32_logits(head, hidden)
    want = hidden.double() @ head.weight.double().T
    assert relative(got, want) < 1e-6 < relative(got.bfloat16(), want)


def test_a_forbidden_token_is_never_sampled_whatever_the_soft_cap():
    head = FusedHead(8, 20, bias=True, logit_softcap=5.0)
    with torch.no_grad():
        head.bias[3] = -torch.inf
    logits = fp32_logits(head, torch.randn(4, 8))
    assert logits[:, 3].isneginf().all() and logits.isfinite().sum() == 4 * 19


def test_parameters_are_shared_and_keep_their_names():
    model = tiny_model("qwen3")
    names = [name for name, _ in model.named_parameters()]
    weight = model.lm_head.weight
    policy = PolicyModel(model)
    assert policy.head.weight is weight and policy.tied
    assert [n for n, _ in policy.named_parameters()] == [f"model.{name}" for name in names]
    assert (policy.vocab_size, policy.hidden_size) == (VOCAB, 32)
    assert len(policy.layers) == 2 and not policy.adapted_head


def test_lora_on_the_head_keeps_pefts_state():
    from peft import get_peft_model_state_dict

    policy, plain = tiny_pair("llama", lora=["lm_head"])
    assert isinstance(policy.head, LoraHead)
    got, want = (get_peft_model_state_dict(m) for m in (policy.model, plain))
    assert got.keys() == want.keys()
    assert policy.state_dict().keys() == {f"model.{name}" for name in plain.state_dict()}
    with policy.model.disable_adapter():
        assert policy.head.merged_weight() is policy.head.weight
    assert policy.head.merged_weight() is not policy.head.weight


class Odd(type(tiny_model("llama"))):
    """A model that changes its logits in a way of its own."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 1
        return out


def test_unknown_changes_of_logits_raise():
    model = tiny_model("llama")
    model.__class__ = Odd
    with pytest.raises(ValueError, match="model: Odd changes its logits"):
        PolicyModel(model)


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


def test_head_saved_as_a_module_raises():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(TypeError, match="name the head in LoraConfig.target_modules"):
        PolicyModel(get_peft_model(tiny_model("llama"), config))


def test_loads_safetensors_and_no_pickles(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "safe")
    policy = PolicyModel.from_pretrained(str(tmp_path / "safe"))
    for (_, got), want in zip(policy.model.named_parameters(), model.parameters(), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        PolicyModel.from_pretrained(str(pickled))


def test_code_in_a_folder_is_not_run(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('this ran')")
    config = (tmp_path / "config.json").read_text()
    entry = (
        '{"auto_map": {"AutoConfig": "modeling_own.A", "AutoModelForCausalLM": "modeling_own.B"},'
    )
    config = config.replace('"model_type": "llama"', '"model_type": "own"')
    (tmp_path / "config.json").write_text(entry + config.lstrip()[1:])
    with pytest.raises(ValueError, match="trust_remote_code"):
        PolicyModel.from_pretrained(str(tmp_path))


def test_random_models_from_a_configuration(tmp_path):
    config = tiny_model("qwen2").config
    policy = PolicyModel.from_config(config, dtype=torch.bfloat16)
    assert policy.head.weight.dtype == torch.bfloat16
    config.save_pretrained(tmp_path)
    assert PolicyModel.from_config(str(tmp_path)).vocab_size == VOCAB


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="raises without a GPU only")
def test_liger_needs_a_gpu():
    with pytest.raises(ValueError, match="liger: got True without a GPU"):
        apply_liger(tiny_model("llama"))


def test_liger_replaces_layers_and_no_loss():
    names = ["rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm", "swiglu", "model"]
    want = {"rope": True, "rms_norm": True, "swiglu": True}
    assert liger_options(names) == {
        **want,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }


LIGER = """
import torch
from tests.tiny import tiny_model
torch.cuda.is_available = lambda: True
from dgrpo.trainer.policy import apply_liger
from liger_kernel.transformers.rms_norm import LigerRMSNorm
model = tiny_model({kind!r})
before = type(model).forward, model.forward
apply_liger(model)
assert (type(model).forward, model.forward) == before, "the loss patch is on"
norm = model.model.norm
assert norm.forward.__func__ is LigerRMSNorm.forward, norm.forward
"""


@pytest.mark.slow  # a process of its own: Liger changes transformers' modules
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_liger_applies_to_the_models_at_hand(kind):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", LIGER.format(kind=kind)], check=True, env=environment)
