"""The number of compiled kernels depends neither on the number of tokens nor on coefficients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {
    "full": {"_row_stats_kernel", "_row_divergence_kernel", "_row_grad_kernel"},
    "topk": {"_row_stats_kernel", "_row_grad_kernel", "_topk_take_kernel", "_topk_put_kernel"},
}


@pytest.fixture(scope="module")
def counts():
    """From a process of its own: this one's kernels are the interpreter's."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launches"],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KERNELS)
class TestVariants:
    def test_every_kernel_was_launched(self, counts, kind, dtype):
        assert set(counts[f"{kind} {dtype}"]["one call"]) == KERNELS[kind]

    def test_one_call_needs_few(self, counts, kind, dtype):
        # Fused and replayed gradients are two variants of one kernel.
        found = counts[f"{kind} {dtype}"]["one call"]
        assert all(n <= (2 if name == "_row_grad_kernel" else 1) for name, n in found.items())

    @pytest.mark.parametrize("change", ["numbers of tokens", "coefficients"])
    def test_no_more_are_compiled(self, counts, kind, dtype, change):
        found = counts[f"{kind} {dtype}"]
        assert found[change] == found["one call"]
