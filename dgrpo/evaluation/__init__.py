"""Evaluation: long-context tasks made here, public benchmarks from files, tables and heat maps."""

from dgrpo.evaluation.benchmarks import (
    LOADERS,
    load_gsm8k,
    load_ifeval,
    load_infinitebench,
    load_longbench,
    load_longbench_v2,
    load_mmlu_pro,
)
from dgrpo.evaluation.evaluate import evaluate
from dgrpo.evaluation.harness import lm_eval_scores
from dgrpo.evaluation.made import made
from dgrpo.evaluation.results import Item, Results, compare
from dgrpo.evaluation.ruler import TASKS as RULER_TASKS
from dgrpo.evaluation.ruler import ruler
from dgrpo.evaluation.statistics import Difference, Interval, interval, paired_bootstrap

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
