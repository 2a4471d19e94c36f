"""Checks of values, at the cost of host syncs: what `check=True` runs."""

from __future__ import annotations

import torch
from torch import Tensor

from dgrpo.ops.inputs import IGNORE
from dgrpo.ops.teachers import TeacherHead, TopKTeacher


def check_finite(name: str, value: Tensor | None, among: Tensor | None = None) -> None:
    """Refuse NaN and inf; only at the flat indices `among`, if given."""
    if value is None or not value.is_floating_point():
        return
    picked = value if among is None else value.reshape(-1)[among]
    bad = int((~torch.isfinite(picked)).sum())
    if bad:
        raise ValueError(f"{name}: got {bad} values that are NaN or infinite, expected finite ones")


def check_targets(targets: Tensor, vocabulary: int, rows: Tensor | None) -> None:
    """Targets in the vocabulary or -100, and `rows` exactly the unmasked ones."""
    flat = targets.reshape(-1)
    outside = (flat != IGNORE) & ((flat < 0) | (flat >= vocabulary))
    if bool(outside.any()):
        raise ValueError(
            f"targets: got {int(flat[outside][0])}, expected {IGNORE} or 0 to {vocabulary - 1}"
        )
    if rows is not None:
        want = (flat != IGNORE).nonzero()[:, 0]
        if not torch.equal(rows.to(want.device).sort().values, want):
            raise ValueError(
                f"rows: got {len(rows)} indices that are not those of the {len(want)} unmasked "
                f"tokens, expected each token whose target is not {IGNORE} once"
            )


def check_teacher_values(teacher: TeacherHead | TopKTeacher | None, vocabulary: int) -> None:
    if isinstance(teacher, TeacherHead):
        check_finite("teacher.hidden", teacher.hidden)
        if teacher.rows is not None:
            count = teacher.hidden.shape[:-1].numel()
            if bool(((teacher.rows < -1) | (teacher.rows >= count)).any()):
                raise ValueError(f"teacher.rows: got an index outside, expected -1 to {count - 1}")
    if isinstance(teacher, TopKTeacher):
        ids, logprobs = teacher.token_ids, teacher.logprobs
        if bool(((ids < -1) | (ids >= vocabulary)).any()):
            raise ValueError(
                f"teacher.token_ids: got an id outside, expected -1 (padding) to {vocabulary - 1}"
            )
        ordered = ids.sort(-1).values
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            raise ValueError("teacher.token_ids: got an id twice in a row, expected each once")
        given = logprobs.masked_fill(ids < 0, -torch.inf)
        if bool(given.isnan().any()) or bool((given.double().exp().sum(-1) > 1 + 1e-3).any()):
            raise ValueError(
                "teacher.logprobs: got NaN or a row whose probabilities exceed 1, expected "
                "log-probabilities (nats)"
            )
