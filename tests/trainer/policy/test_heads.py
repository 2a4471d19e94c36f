"""The head's logits, what models do to them, and LoRA on the head."""

import pytest
import torch

from dgrpo.head import FusedHead
from dgrpo.trainer.batch import pack
from dgrpo.trainer.policy import PolicyModel
from dgrpo.trainer.policy.heads import LoraHead
from tests.tiny import (
    make_samples,
    plain_logits,
    relative,
    tiny_model,
    tiny_pair,
)


@pytest.mark.parametrize("kind", ["gemma3", "granite", "cohere", "phi_biased_head"])
def test_logits_for_sampling_are_the_models_own(kind):
    policy, plain = tiny_pair(kind)
    (sample,) = make_samples([(4, 9)])
    (micro,) = pack([sample], 100)
    hidden = policy.hidden_states(micro)
    got = policy.head.fp32_logits(hidden[3:])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain_logits(plain, sample).detach(), rtol=1e-4, atol=1e-5)


def test_logits_of_a_bf16_head_are_not_rounded_to_bf16():
    torch.manual_seed(0)
    head = FusedHead(64, 500, dtype=torch.bfloat16)
    hidden = torch.randn(5, 64).bfloat16()
    got = head.fp32_logits(hidden)
    want = hidden.double() @ head.weight.double().T
    assert relative(got, want) < 1e-6 < relative(got.bfloat16(), want)


def test_a_forbidden_token_is_never_sampled_whatever_the_soft_cap():
    head = FusedHead(8, 20, bias=True, logit_softcap=5.0)
    with torch.no_grad():
        head.bias[3] = -torch.inf
    logits = head.fp32_logits(torch.randn(4, 8))
    assert logits[:, 3].isneginf().all() and logits.isfinite().sum() == 4 * 19


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


def test_head_saved_as_a_module_raises():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(TypeError, match="name the head in LoraConfig.target_modules"):
        PolicyModel(get_peft_model(tiny_model("llama"), config))
