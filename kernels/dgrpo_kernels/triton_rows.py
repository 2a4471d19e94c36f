"""The launchers as one backend; `dgrpo.ops.rows_torch` is its twin in plain torch."""

from dgrpo_kernels.row_divergence import row_divergence
from dgrpo_kernels.row_fused import row_fused, takes
from dgrpo_kernels.row_grad import row_grad
from dgrpo_kernels.row_stats import row_stats
from dgrpo_kernels.topk import topk_put, topk_take

FUSES_DGRPO = True  # row_grad takes `policy`
ROW_FUSED = False  # `row_fused` in place of row_stats and row_grad: once a GPU has confirmed it

__all__ = [
    "FUSES_DGRPO",
    "ROW_FUSED",
    "row_divergence",
    "row_fused",
    "row_grad",
    "row_stats",
    "takes",
    "topk_put",
    "topk_take",
]
