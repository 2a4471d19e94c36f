"""Optimiser steps on one rank's samples, for tests/trainer/policy/fsdp_cases.py."""

import copy
import functools

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dgrpo.ops import Options
from dgrpo.trainer.batch import balanced_count, pack
from dgrpo.trainer.policy import fsdp
from tests.tiny import VOCAB, make_samples

# Prompt and completion lengths by rank: uneven sequences and uneven numbers of micros (at 18
# tokens: 3, 2, 2, 1; the rest are fillers). On rank 1 the micro of the first sample is all masked.
# One process packs the samples of all ranks otherwise.
SIZES = [[(3, 5), (9, 7), (4, 8), (6, 9)], [(13, 4), (5, 6)], [(2, 13), (11, 2)], [(1, 1)]]
MAX_TOKENS = 18
MAX_TOKENS_OF_ONE = 40
COEFFICIENTS = {"teacher_coef": 0.5}


def samples_of(rank):
    """The samples of one rank, with tokens that a teacher does not guide."""
    samples = make_samples(SIZES[rank], seed=rank)
    for number, sample in enumerate(samples):
        if (rank, number) == (1, 0):
            sample.loss_mask = torch.zeros_like(sample.mask)
        sample.teacher_mask = torch.rand(sample.mask.shape, generator=seeded(rank)) < 0.7
        sample.teacher_prompt_ids = torch.randint(3, VOCAB, (4,), generator=seeded(rank))
    return samples


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def everyone():
    return [sample for rank in range(dist.get_world_size()) for sample in samples_of(rank)]


def step(policy, samples, scale, *, objective=None, teacher=None, every_micro=True):
    """Forward and backward of one optimiser step; the loss summed over micros."""
    sharded = scale > 1
    samples = [copy.copy(sample) for sample in samples]
    for sample in samples:
        sample.token_weights = sample.token_weights * scale
    max_tokens = MAX_TOKENS if sharded else MAX_TOKENS_OF_ONE
    if teacher is not None:
        teacher.attach(samples, max_tokens)
    micros = pack(samples, max_tokens, **COEFFICIENTS)
    if sharded:
        micros = balanced_count(micros, **COEFFICIENTS)
    total = torch.zeros((), dtype=torch.float64)
    options = Options(vocab_size=VOCAB)
    for number, micro in enumerate(micros):
        if sharded:
            fsdp.sync_gradients(policy, number == len(micros) - 1, every_micro)
        head = None if teacher is None else teacher.head(micro)
        if objective is None:
            inputs = micro.head_inputs("loss", teacher=head, options=options)
        else:
            ids = torch.where(micro.targets == -100, -1, micro.sequence_ids)
            function = functools.partial(objective, sequence_ids=ids)
            inputs = micro.head_inputs(
                "stats", teacher=head, sequence_objective=function, options=options
            )
        loss = policy(micro, inputs=inputs).loss
        loss.backward()
        total += loss.detach().double()
    return total


def full_gradients(policy):
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in policy.named_parameters()
        if p.grad is not None
    }


def worst(got, want):
    """Largest relative error of same-named tensors, against the largest norm where tiny."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    floor = 1e-3 * max(float(t.norm()) for t in want.values())
    return max(float((got[n] - t).norm()) / max(float(t.norm()), floor) for n, t in want.items())
