"""The report's page in a real browser: what is seen, clicked and typed. Skipped where none is."""

import gzip
import json

import pytest

from dgrpo.trainer.report import write_report
from tests.trainer.report.browser import find, make_page  # noqa: F401
from tests.trainer.report.runs import EVIL, rollout

pytestmark = pytest.mark.skipif(find() is None, reason="no chromium or chrome is installed")

WINDOWS = [(1400, 900, False), (1400, 900, True), (500, 900, False), (400, 800, True)]
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
ROWS = "[...document.querySelectorAll('#list [data-place]')]"
TITLES = "[...document.querySelectorAll('.chart h3')].map(node => node.firstChild.textContent)"


def write(folder, steps=60, rollouts=(), settings="", **metrics):
    """A run of GRPO with a teacher; `metrics` are functions of the step."""
    (folder / "rollouts").mkdir(parents=True)
    usual = {
        "reward": lambda s: s / 100,
        "loss": lambda s: 1 / s,
        "lr": lambda s: 0.001,
        "clipped": lambda s: 0.0,
        "time/step": lambda s: 2.0 + s % 3,
        "time/train": lambda s: 1.0 + s % 2,
        "time/evaluation": lambda s: 500.0 + s if s % 20 == 0 else None,
        "evaluation/reward": lambda s: s / 80 if s % 20 == 0 else None,
    }
    lines = []
    for step in range(1, steps + 1):
        values = {name: f(step) for name, f in (usual | metrics).items()}
        lines.append({"step": step} | {k: v for k, v in values.items() if v is not None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    by_step = {}
    for record in rollouts:
        by_step.setdefault(record["step"], []).append(json.dumps(record) + "\n")
    for step, records in by_step.items():
        path = folder / f"rollouts/step-{step:08d}-00000.jsonl.gz"
        path.write_bytes(gzip.compress("".join(records).encode(), 1))
    if settings:
        (folder / "settings.yaml").write_text(settings)
    return folder


def attempts():
    """Two prompts in each of two steps; prompt 7 of step 1 was solved once and failed once."""
    spoken = ["The", " answer", " is", " 42"]
    return [
        rollout(1, 6, 0, ["x"] * 9, reward=0, divergence=[9.0] * 9),
        rollout(1, 7, 0, spoken, reward=1, divergence=[0.1] * 4),
        rollout(1, 7, 1, spoken, reward=0, divergence=[0.5] * 4),
        rollout(1, 7, 2, ["\x00"] * 4, reward=0, divergence=[8.0] * 4),
        rollout(2, 6, 0, [EVIL, "", "c\nd"], reward=1, divergence=[0.0, 0.0, 0.3]),
        rollout(2, 7, 0, spoken[:2], reward=None, divergence=[0.2] * 2),
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "first-run"
    long = "data: {sources: [{path: " + "long/" * 100 + "}]}\nmethod: {preset: grpo}\n"
    write(folder, rollouts=attempts(), settings=long + "model: {name: student}\nsteps: 60\n")
    return f"file://{write_report(folder).page}"


def listed(page):
    """Step, prompt and index of each row of the list."""
    return [
        tuple(row)
        for row in page.value(
            f"{ROWS}.map(n => rows[n.dataset.place]).map(row => [row.step, row.group, row.index])"
        )
    ]


def shown(page):
    """Step, prompt and index of the rollout that is read."""
    return tuple(page.value("[at.row.step, at.row.group, at.row.index]"))


@pytest.mark.parametrize("width, height, dark", WINDOWS)
def test_it_opens_at_its_top_within_the_window(page, report, width, height, dark):
    page.open(report, width, height, dark)
    assert page.value("scrollY") == 0 and page.value(OVERFLOW) <= 0 and not page.errors
    title = page.value("document.getElementById('title').getBoundingClientRect().toJSON()")
    assert 0 <= title["top"] < title["bottom"] <= height
    # What one wants to know is in the first window, above the curves.
    text = page.value(
        "[...document.querySelectorAll('#runs, #common')].map(node => node.innerText).join('\\n')"
    )
    for told in ("0.035 → 0.575", "0.25 → 0.75", "grpo", "student", "60 of 60", "0:03:00 training"):
        assert told in text
    assert page.value("document.querySelector('#runs dl').getBoundingClientRect().bottom") < height
    # No part hangs out of the window, be it hidden by an edge or not.
    assert (
        page.value(
            """[...document.querySelectorAll("body *")].filter((node) => {
                const right = node.getBoundingClientRect().right;
                return right > innerWidth + 0.5 && !node.closest("pre, svg, summary span");
            }).map((node) => node.outerHTML)"""
        )
        == []
    )


def test_the_colours_follow_the_scheme(page, report):
    def brightness(selector, what):
        color = page.value(f"getComputedStyle(document.querySelector('{selector}')).{what}")
        return sum(int(part) for part in color.strip("rgb()").split(",")) / 765

    for dark in (False, True):
        page.open(report, 1400, 900, dark)
        assert (brightness("body", "backgroundColor") < 0.2) == dark
        for selector in ("h1", "dd", "dt", ".chart h3", "#count", "#text", "#list button"):
            apart = brightness(selector, "color") - brightness("body", "backgroundColor")
            assert (apart if dark else -apart) > 0.4, selector


def test_charts_that_hold_one_constant_are_folded(page, report):
    page.open(report, 1400, 900)
    drawn = page.value(TITLES)
    assert "reward" in drawn and "loss" in drawn
    assert "learning rate" not in drawn and "share of clipped tokens" not in drawn
    assert not page.value("document.getElementById('constant').open")
    page.click("#constant summary")
    assert page.value("document.getElementById('constant').open")
    text = page.value("document.getElementById('constant').innerText")
    assert text.split("\n")[0] == "2 metrics with one constant value"
    assert "learning rate" in text and "0.001" in text


def test_an_evaluation_does_not_flatten_the_seconds(page, tmp_path):
    # As older logs have it: the step after an evaluation takes as long as it.
    step = lambda s: 500.0 if s % 20 == 1 else 2.0 + s % 3  # noqa: E731
    page.open(f"file://{write_report(write(tmp_path, **{'time/step': step})).page}", 1400, 900)
    seconds = page.value(
        """(() => {
            const find = (title) => [...document.querySelectorAll(".chart")].find(
                (node) => node.querySelector("h3").firstChild.textContent === title);
            const chart = find("seconds");
            return [chart.innerText, [...chart.querySelectorAll("path")].map((path) =>
                path.getBBox().height), Boolean(find("seconds of an evaluation")),
                [...chart.querySelectorAll("text")].map((node) => node.textContent)];
        })()"""
    )
    assert "train" in seconds[0] and "evaluation" not in seconds[0] and seconds[2]
    assert "up to 500 ↑" in seconds[3] and "10" in seconds[3]
    assert all(height > 5 for height in seconds[1])


def test_it_opens_on_a_readable_rollout_of_a_mixed_group(page, report):
    page.open(report, 1400, 900)
    assert shown(page) == (1, 7, 1)  # not the one of control characters, nor the unmixed prompt
    assert page.value("document.getElementById('text').innerText") == "The answer is 42"
    assert page.value("location.hash") == ""
    assert listed(page)[2] == (1, 7, 1) and len(listed(page)) == 6


def test_rollouts_are_filtered_by_typing_and_sorted_by_clicking(page, report):
    page.open(report, 1400, 900)
    page.type("#reward-low", "1")
    assert listed(page) == [(1, 7, 0), (2, 6, 0)]
    assert shown(page) == (1, 7, 0)  # the one before has left the list
    assert page.value("document.getElementById('count').innerText") == "2 of 6 rollouts"
    page.type("#length-high", "3")
    assert listed(page) == [(2, 6, 0)]
    page.click("#clear")
    assert len(listed(page)) == 6 and page.value("document.getElementById('clear').hidden")
    page.type("#divergence-low", "0.15")
    page.type("#divergence-high", "1")
    assert listed(page) == [(1, 7, 1), (2, 7, 0)]
    page.type("#reward-low", "7")
    assert listed(page) == [] and page.value("document.getElementById('rollout').hidden")
    assert "No rollout is within" in page.value("document.getElementById('side').innerText")
    page.click("#clear")
    assert not page.value("document.getElementById('rollout').hidden")
    page.click("[data-sort=reward]")  # largest first, unknown last
    assert [r for r, *_ in page.value(f"{ROWS}.map(n => [rows[n.dataset.place].reward])")] == [
        1, 1, 0, 0, 0, None,
    ]  # fmt: skip
    page.click("[data-sort=reward]")
    assert [r for r, *_ in page.value(f"{ROWS}.map(n => [rows[n.dataset.place].reward])")] == [
        0, 0, 0, 1, 1, None,
    ]  # fmt: skip
    assert shown(page) == listed(page)[0]
    page.click("[data-sort=divergence]")
    assert listed(page)[:2] == [(1, 6, 0), (1, 7, 2)]
    page.click("[data-sort=length]")
    assert listed(page)[0] == (1, 6, 0) and listed(page)[-1] == (2, 7, 0)
    page.click("#list li:last-child button")
    assert shown(page) == (2, 7, 0) and page.value("location.hash") == "#0/2/7/0/divergence"
    assert not page.errors


def test_the_keys_walk_through_the_list(page, report):
    page.open(report, 1400, 900)
    page.value("document.querySelector('[data-place=\"0\"]').click()")
    page.key("ArrowRight")
    assert shown(page) == (1, 7, 0)
    page.key("]")
    assert shown(page) == (2, 7, 0)
    page.key("2")
    assert page.value("document.querySelector('[aria-checked=true]').textContent") == "advantage"


def test_the_address_names_a_rollout_and_its_text_stays_text(page, report):
    page.open(f"{report}#0/2/6/0/advantage", 1400, 900)
    assert shown(page) == (2, 6, 0) and page.value("scrollY") == 0
    assert page.value("document.title") == "first-run"
    tokens = page.value("[...document.querySelectorAll('#text [data-i]')].map(n => n.textContent)")
    assert tokens == [EVIL, "", "c↵\nd"]
    assert page.value("document.querySelectorAll('#text .part').length") == 1
    assert "(37, 99, 201" in page.value("document.querySelector('#text [data-i]').style.background")
    page.click("#prompt summary")
    assert page.value("document.querySelector('#prompt pre').textContent") == EVIL
