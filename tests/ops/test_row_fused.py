"""The op with `row_fused` switched on."""

import pytest
import torch

from dgrpo_kernels import triton_rows
from tests.ops.cases import case_of, check_dgrpo, teacher_of


@pytest.mark.parametrize("kind", ["full", "by_rows", "none", "topk"])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
def test_the_op_with_one_row_kernel(kind, dtype, most, monkeypatch):
    calls, launch = [], triton_rows.row_fused
    monkeypatch.setattr(triton_rows, "ROW_FUSED", True)
    monkeypatch.setattr(
        triton_rows, "row_fused", lambda *args, **more: calls.append(launch(*args, **more))
    )
    case = case_of(14, dtype=dtype)
    teacher = None if kind == "none" else teacher_of(kind, case)
    check_dgrpo(
        case, most, "triton", teacher=teacher, old_logprobs=case.old_logprobs, memory_budget=9000
    )
    assert (len(calls) > 1) == (kind != "topk")  # a top-k teacher's columns leave holes


def test_it_is_off_until_a_gpu_has_confirmed_it():
    assert not triton_rows.ROW_FUSED
