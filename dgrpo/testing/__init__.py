"""What tests and benchmarks measure against: an fp64 oracle, peaked inputs, an error measure.

Imports torch alone, nothing of the library.

    case = peaked_case(64, 48, 1000)
    want = oracle(case.hidden, case.weight, case.targets, case.advantages, teacher=my_teacher)
    error = relative_error(hidden.grad, want.d_hidden)
"""

from dgrpo.testing.cases import PeakedCase, near_equal_teacher, peaked_case, relative_error
from dgrpo.testing.oracle import OracleOutput, OracleStats, oracle, oracle_stats

__all__ = [
    "OracleOutput",
    "OracleStats",
    "PeakedCase",
    "near_equal_teacher",
    "oracle",
    "oracle_stats",
    "peaked_case",
    "relative_error",
]
