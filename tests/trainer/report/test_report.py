"""The report: whole on runs that broke off, one file that needs nothing else, safe with text."""

import gzip
import os
import re

from dgrpo.trainer.report import write_report
from dgrpo.trainer.report.page import embed
from tests.trainer.report.runs import EVIL, data_of, rollout, write_run


def test_a_run_that_broke_off(tmp_path):
    rollouts = [rollout(1, index=i) for i in range(2)] + [rollout(2, text=[EVIL, ""])]
    write_run(tmp_path / "run", [1, 2, 3], rollouts, tail='{"step": 4, "lo')
    cut = tmp_path / "run/rollouts/step-00000002-00000.jsonl.gz"
    with gzip.open(cut, "at", compresslevel=0) as file:
        file.write("x" * 1000)
    os.truncate(cut, cut.stat().st_size - 500)
    report = write_report(tmp_path / "run")
    assert report.curves == tmp_path / "run/curves.png"
    assert report.curves.read_bytes().startswith(b"\x89PNG")
    page = report.page.read_text()
    data = data_of(page)
    (run,) = data["runs"]
    assert data["title"] == "run"
    assert run["notes"] == ["metrics.jsonl: 1 unreadable line", "rollouts: 1 unreadable"]
    assert run["rollouts"] == rollouts
    assert data["panels"][0] == {"title": "reward", "lines": [["reward", "reward"]]}
    reward = {"steps": [1, 2, 3], "values": [0.1, 0.2, 0.3], "mean": None, "top": None}
    assert run["series"]["reward"] == reward
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_the_page_needs_nothing_else_and_text_stays_text(tmp_path):
    write_run(tmp_path, [1], [rollout(1, text=[EVIL])])
    page = write_report(tmp_path).page.read_text()
    assert page.count("</script>") == 2 and page.count("<script") == 2 and "<!--" not in page
    assert not re.search(r"""(src|href|action)\s*=|@import|url\(|fetch\(|import\(""", page)
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "@@" not in page
    assert data_of(page)["runs"][0]["rollouts"][0]["text"] == [EVIL]
    assert embed({"a": "</script>\u2028"}) == '{"a":"\\u003c/script>\\u2028"}'


def test_template_marks_in_a_rollout_stay(tmp_path):
    write_run(tmp_path, [1], [rollout(1, text=["@@STYLE@@", "@@DATA@@", "\\1"])])
    page = write_report(tmp_path).page.read_text()
    assert data_of(page)["runs"][0]["rollouts"][0]["text"] == ["@@STYLE@@", "@@DATA@@", "\\1"]


def test_stages_of_a_run(tmp_path):
    write_run(tmp_path / "b-first", [1, 2])
    write_run(tmp_path / "a-second", [1, 2, 3])
    os.utime(tmp_path / "b-first/metrics.jsonl", (1, 1))
    data = data_of(write_report(tmp_path).page.read_text())
    assert [run["name"] for run in data["runs"]] == ["b-first", "a-second"]
    assert [run["shown"] for run in data["runs"]] == [False, True]


def test_a_run_before_its_first_step(tmp_path):
    write_run(tmp_path, [])
    report = write_report(tmp_path)
    data = data_of(report.page.read_text())
    assert data["panels"] == [] and data["runs"][0]["facts"] == [["steps", "0, not finished"]]
    assert report.curves.stat().st_size > 0


# Which rollouts


# Curves
