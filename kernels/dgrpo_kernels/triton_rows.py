"""The launchers as one backend; `dgrpo.ops.rows_torch` is its twin in plain torch."""

from dgrpo_kernels.row_divergence import row_divergence
from dgrpo_kernels.row_grad import row_grad
from dgrpo_kernels.row_stats import row_stats
from dgrpo_kernels.topk import topk_put, topk_take

FUSES_DGRPO = True  # row_grad takes `policy`

__all__ = ["FUSES_DGRPO", "row_divergence", "row_grad", "row_stats", "topk_put", "topk_take"]
