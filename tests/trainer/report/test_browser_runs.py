"""The page of several, short, long and odd runs in a real browser. Skipped where none is."""

import pytest

from dgrpo.trainer.report import write_report
from tests.trainer.report.browser import find, make_page  # noqa: F401
from tests.trainer.report.runs import rollout
from tests.trainer.report.test_browser_page import OVERFLOW, TITLES, listed, shown, write

pytestmark = pytest.mark.skipif(find() is None, reason="no chromium or chrome is installed")


def test_several_runs_share_each_chart(page, tmp_path):
    folders = [write(tmp_path / name, n) for name, n in (("short", 20), ("long", 60), ("one", 1))]
    settings = "method: {preset: grpo}\nmodel: {name: a}\n"
    (folders[0] / "settings.yaml").write_text(settings + "optimizer: {lr: 1.0}\n")
    (folders[1] / "settings.yaml").write_text(settings + "optimizer: {lr: 2.0}\n")
    address = f"file://{write_report(*folders).page}"
    for width in (1400, 400):
        page.open(address, width, 900)
        assert page.value(OVERFLOW) <= 0 and page.value("scrollY") == 0 and not page.errors
    page.resize(1400, 900)
    lines = "[...document.querySelector('.chart').querySelectorAll('path, .names > span')].length"
    assert page.value(TITLES)[0] == "reward" and page.value(lines) == 3 * 2 + 1  # and a mean
    assert "short 0.2" in page.value("document.querySelector('.chart .names').innerText")
    assert page.value("[...document.querySelectorAll('.run h2')].map(n => n.innerText)") == [
        "short",
        "long",
        "one",
    ]
    own = page.value("[...document.querySelectorAll('.run')].map(node => node.innerText)")
    assert "optimizer.lr\n1.0" in own[0] and "optimizer.lr\n2.0" in own[1]
    page.click("#choice button:nth-child(1)")
    page.click("#choice button:nth-child(3)")
    assert (
        page.value("document.querySelectorAll('.chart')[0].querySelectorAll('.names').length") == 0
    )
    page.click("#choice button:nth-child(2)")  # the last one stays
    assert page.value("RUNS.filter(run => run.shown).map(run => run.name)") == ["long"]


def test_unusual_runs(page, tmp_path):
    """One step, none, no reward, unknown metrics; and text of other scripts, long, odd or none."""
    one = write(tmp_path / "one", 1)
    none = write(tmp_path / "none", 0)
    plain = {"reward": lambda s: None, "evaluation/reward": lambda s: None}
    sft = write(
        tmp_path / "sft", 9, **plain, **{"my/odd <b>": lambda s: s, "time/step": lambda s: None}
    )
    odd = [
        rollout(1, 0, 0, []),
        rollout(1, 0, 1, ["שלום ", "עולם", " 漢字仮名", "🙂"], reward=None, divergence=None),
        rollout(1, 0, 2, ["w" * 5000] + ["token "] * 30000, reward=True, rewards={"<i>": None}),
        {"step": 1, "group": 0, "text": ["only", " text"]},
    ]
    strange = write(tmp_path / "strange" / ("x" * 120), 3, rollouts=odd)
    for folder in (one, none, sft, strange):
        for width in (1400, 400):
            page.open(f"file://{write_report(folder).page}", width, 900)
            assert page.value(OVERFLOW) <= 0 and page.value("scrollY") == 0, folder
            for place in range(page.value("rows.length")):
                page.value(f"document.querySelector('[data-place=\"{place}\"]').click()")
                assert page.value(OVERFLOW) <= 0
            assert not page.errors, folder
    page.open(f"file://{one / 'report.html'}", 1400, 900)  # nothing moves: the values are unfolded
    assert page.value("document.getElementById('constant').open")
    page.open(f"file://{none / 'report.html'}", 1400, 900)
    assert "No step has been logged yet." in page.value("document.body.innerText")
    assert "No rollouts have been recorded." in page.value("document.body.innerText")
    page.open(f"file://{sft / 'report.html'}", 1400, 900)
    assert "my" in page.value(TITLES) and "loss" in page.value("$('runs').innerText")
    page.open(f"file://{strange / 'report.html'}#0/1/0/2/divergence", 1400, 900)
    drawn = "document.querySelectorAll('#text [data-i]').length"
    assert page.value(drawn) == 6000  # the others when they are asked for
    page.value("$('more').click()")
    assert page.value(drawn) == 12000
    page.value("goTo(1 - 1e-9)")
    assert page.value(drawn) == 30001 and page.value("$('more').hidden")


def test_thousands_of_rollouts_stay_quick(page, tmp_path):
    many = [
        rollout(step, group, index, ["word "] * 40, reward=(index + step) % 5)
        for step in range(1, 101)
        for group in range(5)
        for index in range(8)
    ]
    page.open(f"file://{write_report(write(tmp_path, rollouts=many)).page}", 1400, 900)
    assert page.value("rows.length") == 4000 and page.value("scrollY") == 0
    took = "(() => { const start = performance.now(); %s; return performance.now() - start; })()"
    for action in ("refresh()", "openRun(0)", "$('reward-low').value = 3; refresh()", "next(1)"):
        assert page.value(took % action) < 2000, action
    page.open(f"file://{tmp_path / 'report.html'}", 1400, 900)
    page.click("[data-sort=reward]")
    top = [row for row in many if row["reward"] == 4]
    assert shown(page) == (1, 0, 3) and len(top) == 800 and len(listed(page)) == 4000
    before = page.value("scrollY")
    page.value("at.row = listed[3999]; show()")  # far below what is seen
    place = page.value(
        "['#list', '#list [aria-pressed=true]'].map("
        "name => document.querySelector(name).getBoundingClientRect().toJSON())"
    )
    assert place[0]["top"] <= place[1]["top"] and place[1]["bottom"] <= place[0]["bottom"]
    assert page.value("scrollY") == before
