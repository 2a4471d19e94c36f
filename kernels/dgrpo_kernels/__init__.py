"""Triton kernels over rows of logits: statistics, gradients, top-k teacher columns.

One kernel and its launcher a file; `triton_rows` gathers the launchers. Nothing here knows
autograd, modules or processes. What stands in this file needs no Triton.
"""

from dgrpo_kernels.rows import DIVERGENCES, ROW_MULTIPLE, STATS, Logits, PolicyRows, RowStats

__all__ = ["DIVERGENCES", "ROW_MULTIPLE", "STATS", "Logits", "PolicyRows", "RowStats"]
