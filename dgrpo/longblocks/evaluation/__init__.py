"""Evaluation: long-context tasks made here, public benchmarks from files, tables and heat maps."""

from dgrpo.extras import require

require(__name__, "numpy", "transformers", "datasets")

from dgrpo.longblocks.evaluation.benchmarks import (
    LOADERS,
    load_gsm8k,
    load_ifeval,
    load_infinitebench,
    load_longbench,
    load_longbench_v2,
    load_mmlu_pro,
)
from dgrpo.longblocks.evaluation.evaluate import evaluate
from dgrpo.longblocks.evaluation.intervals import Difference, Interval, interval, paired_bootstrap
from dgrpo.longblocks.evaluation.lm_eval import lm_eval_scores
from dgrpo.longblocks.evaluation.results import Item, Results, compare
from dgrpo.longblocks.evaluation.ruler import TASKS as RULER_TASKS
from dgrpo.longblocks.evaluation.ruler import made, ruler

__all__ = [
    "LOADERS",
    "RULER_TASKS",
    "Difference",
    "Interval",
    "Item",
    "Results",
    "compare",
    "evaluate",
    "interval",
    "lm_eval_scores",
    "load_gsm8k",
    "load_ifeval",
    "load_infinitebench",
    "load_longbench",
    "load_longbench_v2",
    "load_mmlu_pro",
    "made",
    "paired_bootstrap",
    "ruler",
]
