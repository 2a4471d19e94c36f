"""Checks of values, at the cost of host syncs: what `check=True` runs."""

from __future__ import annotations

import torch
from torch import Tensor

from dgrpo.ops.inputs import IGNORE, check_teacher_rows
from dgrpo.ops.teachers import TeacherHead, TopKTeacher


def check_finite(name: str, value: Tensor, where: Tensor | None = None) -> None:
    """Raise for NaN and inf; `where` (bool, the leading dimensions) says what counts."""
    bad = ~torch.isfinite(value)
    if where is not None:
        bad = bad[where]
    count = int(bad.sum())
    if count:
        raise ValueError(
            f"{name}: got {count} values that are NaN or infinite, expected finite ones"
        )


def check_bias(name: str, bias: Tensor | None) -> None:
    """Raise for NaN and +inf; -inf forbids a column."""
    if bias is not None and bool((bias.isnan() | (bias == torch.inf)).any()):
        count = int((bias.isnan() | (bias == torch.inf)).sum())
        raise ValueError(
            f"{name}: got {count} values that are NaN or +inf, expected finite ones, or -inf for a "
            "column that is never chosen"
        )


def check_per_token(given: dict[str, Tensor], targets: Tensor) -> None:
    """Raise for NaN and inf at tokens with loss, but where nothing depends on the value.

    A token of weight 0 takes no part. One without advantage has no ratio, so its old and sampler
    log-probabilities may be infinite.
    """
    counts = targets != IGNORE
    if "token_weights" in given:
        check_finite("token_weights", given["token_weights"], counts)
        counts = counts & (given["token_weights"] != 0)
    for name, value in given.items():
        where = counts
        if name in ("old_logprobs", "sampler_logprobs") and "advantages" in given:
            where = counts & ((given["advantages"] != 0) | value.isnan())
        check_finite(name, value, where if value.dim() else None)


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


def check_teacher_values(
    teacher: TeacherHead | TopKTeacher | None, targets: Tensor, vocabulary: int, columns: int
) -> None:
    """Raise for a teacher's values that cannot be used: at tokens with loss, in compared columns.

    `columns` are those of this shard, `vocabulary` those of all shards.
    """
    with_loss = targets.reshape(-1) != IGNORE
    if isinstance(teacher, TeacherHead):
        states = teacher.hidden.reshape(-1, teacher.hidden.shape[-1])
        used = with_loss.to(states.device)
        if teacher.rows is not None:
            check_teacher_rows(teacher)
            chosen = teacher.rows.reshape(-1).to(states.device)[used]
            used = torch.zeros(len(states), dtype=torch.bool, device=states.device)
            used[chosen[chosen >= 0]] = True
        check_finite("teacher.hidden", states, used)
        with teacher.open() as (weight, bias):
            check_finite("teacher.weight", weight[:columns])
            check_bias("teacher.bias", None if bias is None else bias[:columns])
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
        own = teacher.target_logprobs
        if own is not None:
            bad = (own.isnan() | (own > 1e-3)).reshape(-1) & with_loss
            if bool(bad.any()):
                raise ValueError(
                    f"teacher.target_logprobs: got {int(bad.sum())} values that are NaN or above "
                    "0, expected log-probabilities (nats)"
                )
