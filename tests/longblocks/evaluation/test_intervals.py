"""Intervals that hold what they say."""

import numpy as np
import pytest

from dgrpo.longblocks.evaluation import interval, paired_bootstrap


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        found = interval((rng.random(80) < 0.7).astype(float))
        inside += found.low <= 0.7 <= found.high
    assert 0.91 < inside / 300 < 0.99


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(0)
    scores = np.repeat((rng.random(50) < 0.5).astype(float), 8)
    clusters = np.repeat(np.arange(50), 8)
    alone, grouped = interval(scores), interval(scores, clusters)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    assert grouped.mean == alone.mean and grouped.n == 400


def test_all_right_is_not_certain():
    found = interval([1.0] * 10)
    assert found.mean == 1.0 and 0.6 < found.low < 0.8 and found.high > 0.999


def test_partial_scores_are_bootstrapped_and_repeat():
    scores = [0.5, 0.25, 1.0, 0.0, 0.75]
    assert interval(scores) == interval(scores)
    assert interval(scores, resamples=50) != interval(scores, resamples=50, seed=1)


def test_a_paired_difference_is_found_where_single_intervals_overlap():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    a, b = ((hard + 0.1 * rng.random(400) < t).astype(float) for t in (0.60, 0.55))
    paired = paired_bootstrap(a, b)
    assert paired.low > 0 and paired.p < 0.05
    assert interval(a).low < interval(b).high


def test_no_difference_has_a_large_p():
    rng = np.random.default_rng(1)
    a, b = ((rng.random(300) < 0.5).astype(float) for _ in range(2))
    found = paired_bootstrap(a, b)
    assert found.low < 0 < found.high and found.p > 0.05
    assert paired_bootstrap(a, a) == (0.0, 0.0, 0.0, 1.0, 300)


def test_the_difference_is_a_minus_b_and_clusters_count():
    clusters = [i // 4 for i in range(40)]
    found = paired_bootstrap([1.0] * 40, [0.0] * 40, clusters)
    assert found.mean == found.low == found.high == 1.0 and found.p < 0.001


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval([]), "scores: got shape"),
        (lambda: interval([1.0], [1, 2]), "clusters: got 2"),
        (lambda: paired_bootstrap([1.0], [1.0, 0.0]), "b: got 2"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
