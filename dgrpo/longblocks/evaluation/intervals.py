"""Means with intervals, and whether two systems differ on the same items."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
_CELLS = 4_000_000  # resampled values held at once


class Interval(NamedTuple):
    """A mean with its 95 % interval over `n` items."""

    mean: float
    low: float
    high: float
    n: int


class Difference(NamedTuple):
    """Mean of a - b with its 95 % interval, and the two-sided p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def interval(
    scores: Sequence[float],
    clusters: Sequence | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of scores (n,) with a 95 % interval.

    Independent scores of 0 and 1 get the Wilson interval, which does not shrink to nothing where
    all are right; others the percentile bootstrap, which draws whole clusters: `clusters` (n,) say
    what an item belongs to. Raises ValueError for no scores or another number of clusters.
    """
    values = _checked(scores, clusters)
    mean, n = float(values.mean()), len(values)
    grouped = clusters is not None and len(set(clusters)) < n
    if not grouped and np.isin(values, (0.0, 1.0)).all():
        z = 1.96
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return Interval(mean, max(0.0, float(middle - half)), min(1.0, float(middle + half)), n)
    draws = _means(values, clusters if grouped else None, resamples, seed)
    return Interval(mean, *np.percentile(draws, (2.5, 97.5)).tolist(), n)


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The mean of `a - b`: scores (n,) of two systems on the same items, in the same order.

    Items (or whole clusters of them) are drawn with both systems' scores together, so what makes
    an item hard for both does not count. Further arguments and errors as in `interval`.
    """
    if len(a) != len(b):
        raise ValueError(f"b: got {len(b)} scores, expected as many as a has, {len(a)}")
    values = _checked(np.subtract(a, b, dtype=np.float64), clusters)
    draws = _means(values, clusters, resamples, seed)
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    tail = min(np.sum(draws <= 0), np.sum(draws >= 0)) + 1
    p = min(1.0, 2 * float(tail) / (resamples + 1))
    return Difference(float(values.mean()), low, high, p, len(values))


def _checked(scores: Sequence[float], clusters: Sequence | None) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores: got shape {values.shape}, expected at least one number")
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"clusters: got {len(clusters)}, expected one per score, {len(values)}")
    return values


def _means(values: np.ndarray, clusters, resamples: int, seed: int) -> np.ndarray:
    """Means of resampled data, (resamples,)."""
    sums, sizes = values, np.ones(len(values))
    if clusters is not None:
        _, group = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
        sums, sizes = np.bincount(group, values), np.bincount(group).astype(float)
    rng, k, found = np.random.default_rng(seed), len(sums), []
    step = max(1, _CELLS // k)
    for start in range(0, resamples, step):
        drawn = rng.integers(k, size=(min(step, resamples - start), k))
        found.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return np.concatenate(found)
