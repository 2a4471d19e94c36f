"""Small random models for the sampler's tests."""

import torch
import transformers

from dgrpo.ops import Options
from dgrpo.trainer.batch import Sample, pack
from dgrpo.trainer.policy import PolicyModel
from dgrpo.trainer.policy.huggingface import from_config

VOCAB = 64
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {  # what each adds: see the names
    "llama": ("Llama", {}),
    "qwen2: attention bias": ("Qwen2", {}),
    "qwen3: norms of query and key": ("Qwen3", {}),
    "gemma-2: soft caps, sliding window": (
        "Gemma2",
        {"sliding_window": 8, "attn_logit_softcapping": 1.5},
    ),
    "gemma-3: window in some layers": (
        "Gemma3Text",
        {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "granite: scaled logits": ("Granite", {"logits_scaling": 3.0}),
    "cohere: scaled logits, tied": ("Cohere", {"logit_scale": 0.3}),
}
LENGTHS = (5, 21, 13, 100, 7)


def make_policy(name: str = "llama", **changes) -> PolicyModel:
    kind, extra = MODELS[name]
    fields = {**SMALL, **extra, **changes}
    if kind in ("Qwen2", "Granite", "Cohere"):
        fields.pop("head_dim")
    torch.manual_seed(0)
    policy = PolicyModel(from_config(getattr(transformers, f"{kind}Config")(**fields)))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # peaked, as a trained model is
    return policy


def make_prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in LENGTHS]


def tokens(rollouts) -> list[list[int]]:
    return [rollout.completion_ids.tolist() for rollout in rollouts]


def scored(policy, rollouts, temperature=1.0) -> list[torch.Tensor]:
    """The trainer's own log-probabilities."""
    found = [None] * len(rollouts)
    for micro in pack([Sample(r.prompt_ids, r.completion_ids) for r in rollouts], 300):
        inputs = micro.head_inputs("logprobs", options=Options(temperature=temperature))
        with torch.no_grad():
            out = policy(micro, inputs=inputs)
        for place, values in micro.per_sample(out.logprobs):
            found[place] = values
    return found
