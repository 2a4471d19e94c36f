"""Settings of the GPU tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_fp32():
    """TF32 would be the user's choice, and 1e-3 off."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
