"""The comparison's statistics, and that the committed results, table and page belong together."""

import numpy as np
import pytest

from examples.compare import figures, raw, tables
from examples.compare.plan import HERE

PAGE = HERE.parent.parent / "docs" / "comparison.md"
METHODS = {"sft", "kd", "grpo", "opd", "dgrpo"}


# Statistics


def test_the_interval_grows_with_what_prompts_of_a_document_share():
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(100), 4)
    alike = np.repeat(rng.integers(0, 2, (3, 100)), 4, axis=1).astype(float)
    apart = rng.integers(0, 2, (3, 400)).astype(float)
    wide, narrow = (tables.estimate(x, documents) for x in (alike, apart))
    assert wide.mean == alike.mean() and wide.low < wide.mean < wide.high
    assert (wide.high - wide.low) > 1.5 * (narrow.high - narrow.low)


def test_the_interval_grows_with_what_differs_between_seeds():
    documents = np.arange(400)
    same = np.tile(np.arange(400) % 2, (3, 1)).astype(float)
    other = same.copy()
    other[0], other[1] = 0.0, 1.0
    steady, shaky = (tables.estimate(x, documents) for x in (same, other))
    assert (shaky.high - shaky.low) > 3 * (steady.high - steady.low)


def test_the_coverage_of_the_interval_over_documents_is_about_right():
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(60), 4)
    inside = 0
    for _ in range(200):
        share = rng.beta(2, 2, 60)
        values = (rng.random(240) < np.repeat(share, 4)).astype(float)[None]
        found = tables.estimate(values, documents, draws=400)
        inside += found.low <= 0.5 <= found.high
    assert 0.9 <= inside / 200 <= 0.99


# What is committed


@pytest.fixture(scope="module")
def committed():
    return raw.read(HERE / "results" / "small")


def test_the_committed_table_follows_from_the_committed_scores(committed, tmp_path):
    text = tables.write(committed, tmp_path)
    assert text == (HERE / "results" / "small" / "table.md").read_text()


def test_every_row_of_the_page_is_one_of_the_table():
    known = (HERE / "results" / "small" / "table.md").read_text().splitlines()
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(("|", "* greedy"))]
    assert len(rows) > 20
    assert [row for row in rows if row not in known] == []


def test_the_committed_comparison_is_a_whole_one(committed):
    assert len(committed.seeds) >= 3 and set(METHODS) <= set(committed.methods)
    assert len(committed.documents) >= 2000
    for method in committed.methods:
        assert tables.right(committed, method, "greedy").shape == (3, len(committed.documents))
        for seed in committed.seeds:
            lines = committed.metrics[f"{method}/seed-{seed}"]
            steps = [line["step"] for line in lines if "loss" in line]
            assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 100


def test_the_committed_figures_can_be_drawn(committed, tmp_path):
    figures.draw(committed, tmp_path)
    assert all(
        (tmp_path / name).stat().st_size > 20_000 for name in ("methods.png", "questions.png")
    )
