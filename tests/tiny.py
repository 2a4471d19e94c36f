"""Tiny random models of every kind that is supported, samples for them, and a plain loss."""

import copy

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from dgrpo.ops import Options
from dgrpo.trainer.batch import Sample, pack
from dgrpo.trainer.policy import PolicyModel

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 6
KINDS = {  # name: configuration class, what differs from SMALL
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_untied": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "mistral_window": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": WINDOW, "final_logit_softcapping": 0.5},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": WINDOW, "final_logit_softcapping": 0.5},
    ),
    "granite": ("GraniteConfig", {"logits_scaling": 0.2}),
    "cohere": ("CohereConfig", {"logit_scale": 5.0}),
    "cohere2": ("Cohere2Config", {"logit_scale": 5.0, "sliding_window": WINDOW}),
    "phi_biased_head": ("PhiConfig", {"num_key_value_heads": 4}),
}


def tiny_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A Hugging Face model with random weights large enough that its logits differ."""
    name, extra = KINDS[kind]
    config = getattr(transformers, name)(**{**SMALL, **extra, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.1 if parameter.dim() > 1 else 0.02
            parameter.add_(spread * torch.randn(parameter.shape, dtype=torch.float32).to(dtype))
    return model.eval()


def tiny_pair(kind: str, lora=None, **options) -> tuple[PolicyModel, torch.nn.Module]:
    """A policy and an untouched copy of the model in it."""
    model = tiny_model(kind, **options)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=3, lora_alpha=5, target_modules=lora, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    plain = copy.deepcopy(model)
    return PolicyModel(model), plain


def make_sample(prompt: int, completion: int, seed: int, **fields) -> Sample:
    """Random tokens, advantages, weights and old log-probabilities."""
    g = torch.Generator().manual_seed(seed)
    return Sample(
        torch.randint(3, VOCAB, (prompt,), generator=g),
        torch.randint(3, VOCAB, (completion,), generator=g),
        **{
            "advantages": torch.randn(completion, generator=g),
            "loss_mask": torch.rand(completion, generator=g) < 0.8,
            "token_weights": torch.rand(completion, generator=g),
            "old_logprobs": -4 - torch.rand(completion, generator=g),
            **fields,
        },
    )


def make_samples(sizes, seed: int = 0, **fields) -> list[Sample]:
    """`sizes` lists (prompt, completion) lengths."""
    return [make_sample(p, c, 100 * seed + i, **fields) for i, (p, c) in enumerate(sizes)]


SIZES = [(3, 5), (1, 1), (12, 9), (4, 8), (2, 13)]
# Prompts with the completions that share them: longer and shorter than the window, a prompt of one
# token, completions of one token, a sample alone.
GROUPS = [(9, (5, 1, 8)), (1, (3, 2)), (4, (6,)), (2, (1, 1, 4)), (14, (2, 7))]


def make_groups(groups=GROUPS, **fields) -> list[Sample]:
    """`groups` lists (prompt length, completion lengths); their samples come in turns."""
    samples = []
    for turn in range(max(len(sizes) for _, sizes in groups)):
        for number, (prompt, sizes) in enumerate(groups):
            if turn < len(sizes):
                sample = make_sample(prompt, sizes[turn], 100 * turn + number, **fields)
                sample.prompt_ids = make_sample(prompt, 1, number).prompt_ids
                sample.group, sample.index = number, turn
                samples.append(sample)
    return samples


def plain_logits(model: torch.nn.Module, sample: Sample, prompt: Tensor | None = None) -> Tensor:
    """(C, V) logits before the completion's tokens, from Hugging Face's own forward."""
    prompt = sample.prompt_ids if prompt is None else prompt
    ids = torch.cat([prompt, sample.completion_ids])[None]
    return model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]


def plain_loss(
    model: torch.nn.Module,
    samples: list[Sample],
    teacher: torch.nn.Module | None = None,
    beta: float = 0.5,
    clip: float = 0.2,
) -> Tensor:
    """The objective of docs/mathematics.md: the sum over all samples, from whole logits."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for sample in samples:
        logp_all = torch.log_softmax(plain_logits(model, sample), -1)
        logp = logp_all.gather(-1, sample.completion_ids[:, None])[:, 0]
        old = logp.detach() if sample.old_logprobs is None else sample.old_logprobs
        ratio = (logp - old).exp()
        gain = torch.minimum(
            ratio * sample.advantages, ratio.clamp(1 - clip, 1 + clip) * sample.advantages
        )
        losses = -gain
        if teacher is not None:
            with torch.no_grad():
                t = plain_logits(teacher, sample, sample.teacher_prompt_ids)
                logq = torch.log_softmax(t[:, :VOCAB], -1)
            kl = (logp_all.exp() * (logp_all - logq)).sum(-1)
            losses = losses + beta * kl * sample.guided
        total = total + (sample.token_weights * losses * sample.mask).sum()
    return total


def relative(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error."""
    want = want.detach().double()
    error = torch.linalg.vector_norm(got.detach().double() - want)
    return float(error / torch.linalg.vector_norm(want).clamp_min(1e-30))


def teacher_samples(own_prompts=True):
    """Samples whose teacher guides some tokens, on prompts of its own."""
    samples = make_samples(SIZES)
    g = torch.Generator().manual_seed(7)
    for number, sample in enumerate(samples):
        sample.teacher_mask = torch.rand(sample.mask.shape, generator=g) < 0.7
        if own_prompts and number % 2 == 0:
            sample.teacher_prompt_ids = torch.randint(3, VOCAB, (2 + number,), generator=g)
    return samples


def loss_with(policy, samples, teacher, max_tokens=25, share_prompts=True, **options):
    """The loss over all micros with a teacher, with gradients accumulated."""
    teacher.attach(samples, max_tokens, share_prompts)
    total = 0.0
    for micro in pack(samples, max_tokens, share_prompts=share_prompts, teacher_coef=0.5):
        head = teacher.head(micro)
        inputs = micro.head_inputs(teacher=head, options=Options(**options))
        out = policy(micro, inputs=inputs)
        out.loss.backward()
        total += float(out.loss.detach())
    return total


def assert_same_gradients(policy: PolicyModel, plain: torch.nn.Module, limit: float = 1e-4):
    """Relative error of every parameter's gradient, those near zero against the largest."""
    got, want = (
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for model in (policy.model, plain)
    )
    assert got.keys() == want.keys()
    floor = 1e-4 * max(float(g.norm()) for g in want.values())
    for name, grad in want.items():
        error = float((got[name] - grad).norm() / grad.norm().clamp_min(floor))
        assert error < limit, f"{name}: {error:.1e}"
