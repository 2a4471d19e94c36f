"""Checks of values, at the cost of host syncs: what `check=True` runs."""

from __future__ import annotations

import torch
from torch import Tensor

from dgrpo.ops.inputs import IGNORE


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
