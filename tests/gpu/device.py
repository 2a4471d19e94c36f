"""What the GPU tests share: the device, and how they are skipped without one.

What does not need a GPU in them also runs on the CPU with `DGRPO_TEST_DEVICE=cpu`, to see that it
is right before a GPU is there.
"""

import os

import pytest
import torch

from dgrpo.testing import PeakedCase
from tests.ops.cases import case_of

DEVICE = torch.device(os.environ.get("DGRPO_TEST_DEVICE", "cuda"))
HAS_GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
gpu_tests = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not HAS_GPU, reason="needs a GPU"),
]
MIB = 2**20


def small(dtype: torch.dtype = torch.float32, tokens: int = 200, vocab: int = 3001) -> PeakedCase:
    """A case of the other tests, on the device."""
    return case_of(tokens, vocab, dtype=dtype, device=DEVICE)


def weighed(stats):
    """Per-token losses with a slope in every statistic."""
    return 0.5 * stats.divergence - stats.logprobs - 0.1 * stats.entropy
