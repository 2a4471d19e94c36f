"""Nothing waits for the GPU: on meta tensors, which hold no values, every read of one raises."""

from types import SimpleNamespace

import pytest
import torch

from dgrpo import objectives
from dgrpo.objectives import Context

N = 12
NAMES = [
    "cispo", "dgrpo", "forward_kl_k3", "grpo", "kd", "kdrl", "kl_advantages", "reverse_kl_k1",
    "reverse_kl_k2", "reverse_kl_k3", "reverse_kl_weighted_k3", "sft", "vopd",
]  # fmt: skip


def vector(dtype=torch.float32):
    return torch.empty(N, dtype=dtype, device="meta")


def inputs():
    stats = SimpleNamespace(
        logprobs=vector().requires_grad_(),
        divergence=vector().requires_grad_(),
        entropy=vector().requires_grad_(),
        teacher_logprobs=vector(),
    )
    tensors = ("advantages", "token_weights", "old_logprobs", "ref_logprobs", "sampler_logprobs")
    context = Context(
        **{name: vector() for name in tensors},
        is_cap=2.0,
        clip_dual=3.0,
        teacher_coef=vector(),
        ref_coef=0.1,
        entropy_coef=0.1,
    )
    return stats, context


@pytest.mark.parametrize("name", NAMES)
def test_objectives(name):
    stats, context = inputs()
    result = getattr(objectives, name)(stats, context)
    losses = result[0] if isinstance(result, tuple) else result
    assert losses.shape == (N,)
    if losses.requires_grad:
        losses.sum().backward()


def test_gspo():
    stats, context = inputs()
    losses, _ = objectives.gspo(stats, context, vector(torch.int64))
    losses.sum().backward()
    assert stats.logprobs.grad.shape == (N,)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_weights(kind):
    mask = vector(torch.bool)
    counts = objectives.batch_counts([mask.view(3, 4)], all_reduce=lambda counts: counts.mul_(2))
    weights = objectives.token_weights(
        mask, kind, sequence_ids=vector(torch.int64), counts=counts, max_length=9, world_size=2
    )
    assert weights.shape == (N,)


def test_what_comes_before_the_loss():
    ids = vector(torch.int64)
    for function in (
        objectives.truncated_importance_weights,
        objectives.masked_importance_weights,
    ):
        assert function(vector(), vector(), sequence_ids=ids).shape == (N,)
    for scale in ("std", "none"):
        advantages = objectives.group_advantages(
            vector(), ids, scale=scale, leave_one_out=True, valid=vector(torch.bool)
        )
        assert advantages.shape == (N,)


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0]]
)
def test_a_read_would_be_noticed(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(vector())
