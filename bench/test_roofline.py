"""The estimates: against the hand-made ones, and what moves them."""

from __future__ import annotations

import pytest

from bench import costs, roofline
from bench.costs import CONTRACT
from bench.estimate import blocks_of, estimate, row_kernel_ms
from bench.gpus import GPUS
from bench.loops import Figures
from dgrpo.ops.plan import Plan

# What 256 rows of `row_stats` might have in flight; nothing but that binds it.
STARVED = Figures(
    "row_stats-plain", "sm_90", 0, {}, 0, 0, 2, 64, 8, 1, 16, 16, 16384, 8, 1.0, 1.0, 9.3
)


@pytest.mark.parametrize(
    ("gpu", "part", "block", "ms"),
    [
        ("h200", 256, 2304, 242),
        ("h200", 512, 3584, 231),
        ("h100", 256, 2304, 277),
        ("h100", 512, 3584, 245),
    ],
)
def test_steps_agree_with_those_worked_out_by_hand(gpu, part, block, ms):
    plan = Plan(CONTRACT.tokens, (part,) * (block // part), 0)
    found = estimate(CONTRACT, GPUS[gpu], blocks_of(plan))
    assert found.ms == pytest.approx(ms, rel=0.03) and found.floor == pytest.approx(200, rel=0.01)
    assert found.share == found.floor / sum(found[:-1])


def test_small_parts_are_bound_by_reading_the_head():
    h100 = GPUS["h100"]
    small = estimate(CONTRACT, h100, [[256] * 128])
    large = estimate(CONTRACT, h100, [[512] * 64])
    assert small.z > 1.15 * large.z and small.d_weight == large.d_weight
    assert estimate(CONTRACT, GPUS["h200"], [[256] * 128]).z == pytest.approx(large.z)


def test_a_row_kernel_takes_the_longest_of_its_bounds():
    h200, elements = GPUS["h200"], CONTRACT.tokens * CONTRACT.vocab
    streaming = row_kernel_ms(elements, 8, h200, None)
    assert streaming == pytest.approx(1e3 * 8 * elements / (0.85 * h200.bandwidth))
    assert row_kernel_ms(elements, 8, h200, STARVED) > 1.2 * streaming  # loads arrive too slowly
    deep = STARVED._replace(bytes_in_flight=65536)
    assert row_kernel_ms(elements, 8, h200, deep) == streaming
    assert row_kernel_ms(elements, 8, h200, deep._replace(issue_ms=50.0)) == pytest.approx(50)
    assert row_kernel_ms(elements, 8, h200, deep._replace(mufu_ms=60.0)) == pytest.approx(60)


def figures(*targets, only="plain"):
    names = ("row_stats-plain", "row_grad-plain")
    return {(name, target): STARVED for name in names for target in targets}


def test_what_is_printed_says_that_it_is_computed(monkeypatch, capsys):
    monkeypatch.setattr(roofline, "computed", figures)
    arguments = ["--student", "qwen2.5-7b", "--teacher", "qwen2.5-32b", "--tokens", "4096"]
    roofline.main(arguments)
    assert "estimate, computed, row kernels counted in their machine" in capsys.readouterr().out

    def fails(*targets):
        raise RuntimeError("bench.aot: no compiler")

    monkeypatch.setattr(roofline, "computed", fails)
    roofline.main(arguments)
    assert "bound by HBM alone (bench.aot: no compiler)" in capsys.readouterr().out


def test_the_tables_of_the_docs(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(costs, "computed", figures)
    costs.main()
    text = capsys.readouterr().out
    assert text.count("| H100 |") == text.count("| H200 |") == 6 and text.count("not yet") == 12
    changes = [line for line in text.splitlines() if line.startswith(("| as", "| row", "| and"))]
    milliseconds = [int(line.split("|")[2].split()[0]) for line in changes]
    assert len(changes) == 3 and milliseconds == sorted(milliseconds, reverse=True)
