"""A model on completions that share their prompt, against the same model without sharing."""

import functools

import pytest
import torch

from dgrpo.objectives import gspo
from dgrpo.trainer.batch import IGNORED, pack
from tests.tiny import assert_same_gradients, make_groups, plain_loss, tiny_pair
from tests.trainer.policy.test_model import policy_loss


@pytest.mark.parametrize("max_tokens", [25, 1000])  # groups are split, or all in one micro
@pytest.mark.parametrize("kind", ["qwen3", "mistral_window", "gemma2", "gemma3", "cohere2"])
def test_a_shared_prompt_changes_neither_loss_nor_gradients(kind, max_tokens):
    policy, plain = tiny_pair(kind, dtype=torch.float64)
    apart, _ = tiny_pair(kind, dtype=torch.float64)
    samples = make_groups()
    assert any(micro.prefixes for micro in pack(samples, max_tokens))
    got = policy_loss(policy, samples, max_tokens)
    want = policy_loss(apart, samples, max_tokens, share_prompts=False)
    assert abs(got - want) < 2e-6  # HF computes norms and softmax in fp32
    assert_same_gradients(policy, apart.model, 1e-6)
    plain_loss(plain, samples).backward()
    assert_same_gradients(policy, plain, 1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gemma3", "qwen3_moe"])
def test_a_shared_prompt_changes_no_state_and_no_logprob(kind):
    policy, _ = tiny_pair(kind)
    samples, found = make_groups(), []
    for share in (True, False):
        (micro,) = pack(samples, 1000, share_prompts=share)
        with torch.no_grad():
            hidden = policy.hidden_states(micro)
            out = policy(micro, inputs=micro.head_inputs("logprobs"))
        states = {
            i: hidden[t : t + n] for i, (t, n) in zip(micro.indices, micro.spans, strict=True)
        }
        found.append((states, dict(micro.per_sample(out.logprobs))))
    for got, want in zip(*found, strict=True):
        assert got.keys() == want.keys() == set(range(len(samples)))
        for i in got:
            torch.testing.assert_close(got[i], want[i], rtol=1e-4, atol=1e-5)


def test_completions_of_a_shared_prompt_are_sequences_of_their_own():
    losses = []
    for share in (True, False):
        policy, _ = tiny_pair("qwen3")
        (micro,) = pack(make_groups(), 1000, share_prompts=share)
        ids = torch.where(micro.targets == IGNORED, -1, micro.sequence_ids)
        objective = functools.partial(gspo, sequence_ids=ids)
        inputs = micro.head_inputs("stats", sequence_objective=objective)
        losses.append(policy(micro, inputs=inputs).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
