"""Ceilings of the GPUs that the estimates are for, and how each number is known."""

from __future__ import annotations

from typing import NamedTuple


class Ceilings(NamedTuple):
    """What a GPU reaches at best."""

    flops: float  # bf16 products, per second
    bandwidth: float  # bytes per second, read plus written
    processors: int
    clock: float  # cycles per second under load
    target: str  # the architecture that kernels are compiled for
    source: str


GPUS = {
    "h200": Ceilings(
        790e12, 4.3e12, 132, 1.755e9, "sm_90", "measured once with torch: an 8192^3 product, a copy"
    ),
    "h100": Ceilings(
        790e12,
        3.0e12,
        132,
        1.755e9,
        "sm_90",
        "an H200's products, 0.9 of the data sheet's HBM",
    ),
    "a100": Ceilings(312e12, 2.04e12, 108, 1.41e9, "sm_80", "data sheet peak, dense (SXM4, 80 GB)"),
    "b200": Ceilings(2250e12, 8.0e12, 148, 1.85e9, "sm_100", "data sheet peak, dense"),
}
# The GPU that stands for an architecture where only the architecture is given.
TYPICAL = {"sm_80": "a100", "sm_90": "h200", "sm_100": "b200"}
