"""The built-in sampler: its log-probabilities, its draws, its distribution, its memory."""

import copy
import dataclasses

import pytest
import torch
import transformers

from dgrpo.ops import Options
from dgrpo.trainer.batch import Sample, pack
from dgrpo.trainer.policy import PolicyModel
from dgrpo.trainer.policy.huggingface import from_config
from dgrpo.trainer.rollout import HFSampler, Sampling, hf
from dgrpo.trainer.rollout.kvcache import KVCache
from tests.trainer.rollout.models import (
    LENGTHS,
    MODELS,
    SMALL,
    make_policy,
    make_prompts,
    scored,
    tokens,
)


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return make_policy()


@pytest.fixture(scope="module")
def prompts() -> list[torch.Tensor]:
    return make_prompts()


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_the_trainer(name, prompts):
    policy = make_policy(name)
    drawn = HFSampler(policy).generate(prompts, 3, Sampling(max_tokens=24, temperature=0.8))
    worst = max(
        (ours - rollout.logprobs).abs().max().item()
        for rollout, ours in zip(drawn, scored(policy, drawn, 0.8), strict=True)
    )
    assert worst <= 1e-5, worst
    assert len({tuple(t) for t in tokens(drawn)}) > len(prompts), "samples of a group differ"


def test_lora_and_a_restricted_vocabulary(prompts):
    from peft import LoraConfig

    lora = LoraConfig(target_modules="all-linear", r=4)
    policy = PolicyModel(from_config(transformers.LlamaConfig(**SMALL), lora=lora))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    sampler = HFSampler(policy, vocab_size=20)
    drawn = sampler.generate(prompts[:2], 4, Sampling(max_tokens=16))
    assert max(max(t) for t in tokens(drawn)) < 20
    for micro in pack([Sample(r.prompt_ids, r.completion_ids) for r in drawn], 300):
        inputs = micro.head_inputs("logprobs", options=Options(vocab_size=20))
        out = policy(micro, inputs=inputs)
        for place, values in micro.per_sample(out.logprobs):
            assert torch.allclose(values, drawn[place].logprobs, atol=1e-5)


def test_draws_depend_on_nothing_that_runs_beside(policy, prompts):
    sampling = Sampling(max_tokens=20, seed=3)
    all_together = tokens(HFSampler(policy).generate(prompts, 4, sampling))
    backwards = tokens(HFSampler(policy).generate(prompts[::-1], 4, sampling))
    assert [t for i in range(5) for t in backwards[16 - 4 * i : 20 - 4 * i]] == all_together
    for budget in (30, 200):  # single samples; several waves
        assert (
            tokens(HFSampler(policy, batch_tokens=budget).generate(prompts, 4, sampling))
            == all_together
        )
    alone = tokens(HFSampler(policy).generate(prompts[2:3], 2, sampling))
    assert alone == all_together[8:10], "the index decides, not how many there are"


def test_seed_step_and_key_each_change_the_draws(policy, prompts):
    sampling = Sampling(max_tokens=12, seed=3, step=5)
    sampler = HFSampler(policy)
    base = tokens(sampler.generate(prompts[:1], 2, sampling))
    assert base[0] != base[1]
    assert tokens(sampler.generate(prompts[:1], 2, sampling)) == base
    for changed in ({"seed": 4}, {"step": 6}):
        again = sampler.generate(prompts[:1], 2, dataclasses.replace(sampling, **changed))
        assert tokens(again) != base
    twice = tokens(sampler.generate([prompts[0], prompts[0]], 2, sampling))
    assert twice[:2] == twice[2:], "the prompt itself is the key"
    keyed = tokens(sampler.generate([prompts[0], prompts[0]], 2, sampling, keys=[7, 8]))
    assert keyed[:2] != keyed[2:]
    assert keyed[2:] == tokens(sampler.generate(prompts[:1], 2, sampling, keys=[8]))


def test_distribution_of_whole_completions():
    """Chi-square of 6,000 completions of up to 3 tokens against the exact probabilities."""
    policy = make_policy(vocab_size=4, eos_token_id=2)
    prompt = torch.tensor([3, 1, 0])
    n, temperature = 6000, 1.3
    sampling = Sampling(max_tokens=3, seed=5, temperature=temperature)
    drawn = HFSampler(policy, batch_tokens=10**6).generate([prompt], n, sampling)
    first = {tuple(r.completion_ids.tolist()): r for r in drawn}
    every = [
        torch.tensor(t)
        for a in range(4)
        for t in ([[a]] if a == 2 else [])
        + [[a, b] for b in [2] if a != 2]
        + [[a, b, c] for b in (0, 1, 3) for c in range(4) if a != 2]
    ]
    exact = [
        s.sum().exp().item()
        for s in scored(
            policy,
            [dataclasses.replace(drawn[0], prompt_ids=prompt, completion_ids=t) for t in every],
            temperature,
        )
    ]
    assert abs(sum(exact) - 1) < 1e-5
    counts = {}
    for rollout in drawn:
        key = tuple(rollout.completion_ids.tolist())
        counts[key] = counts.get(key, 0) + 1
    chi, degrees = 0.0, -1
    for completion, probability in zip(every, exact, strict=True):
        expected = n * probability
        if expected >= 5:
            chi += (counts.get(tuple(completion.tolist()), 0) - expected) ** 2 / expected
            degrees += 1
    assert degrees > 10 and len(first) > 10
    assert chi < degrees + 4 * (2 * degrees) ** 0.5, (chi, degrees)


def test_greedy_is_the_likeliest_and_equal_for_all(policy, prompts):
    drawn = HFSampler(policy).generate(prompts[:2], 2, Sampling(max_tokens=6, temperature=0.0))
    assert tokens(drawn)[0] == tokens(drawn)[1]
    for rollout, ours in zip(drawn, scored(policy, drawn), strict=True):
        assert torch.allclose(ours, rollout.logprobs, atol=1e-5)
    hugging_face = make_policy().model
    hugging_face.set_attn_implementation("eager")
    ids = prompts[0]
    for token in tokens(drawn)[0]:
        with torch.no_grad():
            assert hugging_face(ids[None], use_cache=False).logits[0, -1].argmax() == token
        ids = torch.cat([ids, torch.tensor([token])])


def test_prompts_lie_in_the_cache_once(policy, prompts, monkeypatch):
    caches = []
    monkeypatch.setattr(hf, "KVCache", lambda *args: caches.append(KVCache(*args)) or caches[-1])
    HFSampler(make_policy("gemma-3: window in some layers")).generate(
        prompts, 8, Sampling(max_tokens=2, stop_token_ids=())
    )
    sizes = {0: 0, 2: 0}
    for bucket in caches[0].buckets:
        for layer in sizes:
            groups, _, size, _ = bucket.prompt[layer][0].shape
            sizes[layer] += groups * size
    assert sum(LENGTHS) <= sizes[2] <= 1.5 * sum(LENGTHS), "not times the samples"
    assert sizes[0] <= 8 * len(LENGTHS), "a sliding layer keeps its window"


def test_it_leaves_the_policy_and_the_weights_alone(prompts):
    policy = make_policy()
    policy.train()
    before = copy.deepcopy(policy.state_dict())
    sampler = HFSampler(policy)
    sampler.update((1 / 0 for _ in range(3)), version=4)
    drawn = sampler.generate(prompts[:1], 1, Sampling(max_tokens=3))
    assert drawn[0].version == 4 and policy.training
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert sampler.generate([], 4, Sampling()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[]], 1, Sampling()), r"prompts\[0\]: got shape \(0,\)"),
        (([[5]], 0, Sampling()), "n: got 0"),
        (([[5] * 10], 1, Sampling(max_tokens=2048)), "at most 2048 .the model's max_position"),
        (([[5]], 1, Sampling(stop_strings=("x",))), "without a tokenizer"),
    ],
    ids=("empty prompt", "no completions", "no room", "stop strings alone"),
)
def test_bad_calls(policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        HFSampler(policy).generate(*arguments)


def test_bad_keys_and_samplings(policy):
    with pytest.raises(ValueError, match="keys: got 2 for 1 prompts"):
        HFSampler(policy).generate([[5]], 1, Sampling(), keys=[1, 2])
    for changes in ({"max_tokens": 0}, {"temperature": -1.0}, {"stop_strings": ("",)}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            Sampling(**changes)
