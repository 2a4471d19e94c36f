"""Transient memory stays within the byte budget and does not grow with the number of tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20
SLACK = 24 * MIB  # allocator, autograd, tiles of the row backend

linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resident high-water mark"
)
pytestmark = linux


def growth(**sizes) -> int:
    """Bytes by which a fresh process grew over one forward and backward pass."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.memory_growth", json.dumps(sizes)]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout)


def allowed(tokens, budget, vocab=16384, width=64, size=4) -> int:
    """The contract: budget, dHidden twice, dW in fp32, in its own dtype and a scaled copy."""
    d_hidden = 2 * tokens * width * size
    d_weight = vocab * width * (4 + 2 * size)
    return budget + d_hidden + d_weight + SLACK


@pytest.mark.parametrize(
    "sizes",
    [
        {"mode": "loss"},
        {"mode": "stats", "divergence": "jsd"},
        {"mode": "loss", "dtype": "bfloat16", "bias": True},
        {"mode": "loss", "dtype": "float16", "bias": True},
        {"mode": "stats", "dtype": "float16"},
    ],
    ids=["gradient in forward", "recompute", "bf16 with bias", "fp16 with bias", "fp16 recompute"],
)
def test_logits_never_exist(sizes):
    tokens, budget = 2048, 32 * MIB
    logits = tokens * 16384 * 4  # 128 MiB for the student alone
    got = growth(tokens=tokens, budget=budget, **sizes)
    assert got <= allowed(tokens, budget) < logits


def test_growth_does_not_follow_the_number_of_tokens():
    few, many = (growth(tokens=n, budget=16 * MIB, vocab=4096) for n in (1024, 8192))
    states = 2 * 7168 * 64 * 4
    assert many - few <= states + 8 * MIB  # the logits would be 112 MiB more


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["loss", "objective", "stats", "logprobs"])
def test_the_contract(mode):
    got = growth(tokens=16384, vocab=65536, width=256, budget=256 * MIB, mode=mode)
    assert got < 450 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["jsd", "forward_kl"])
def test_the_contract_for_other_divergences_in_bf16(divergence):
    got = growth(
        tokens=8192,
        vocab=65536,
        width=128,
        budget=256 * MIB,
        dtype="bfloat16",
        divergence=divergence,
    )
    assert got < 450 * MIB
