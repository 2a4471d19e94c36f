"""Triton kernels over rows of logits: statistics, gradients, top-k teacher columns.

One kernel and its launcher per file; `triton_rows` gathers the launchers. Nothing here knows
autograd, modules or processes. `rows`, whose names stand in this file, needs no Triton.
"""

from dgrpo_kernels.rows import ROW_MULTIPLE, STATS, Logits, PolicyRows, RowStats

__all__ = ["ROW_MULTIPLE", "STATS", "Logits", "PolicyRows", "RowStats"]
