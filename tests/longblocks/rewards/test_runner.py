"""The runner: what a bad reward costs, the worker process, errors, weights and parts."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgrpo.extras import load_function
from dgrpo.longblocks.rewards.runner import Scorer
from dgrpo.trainer.config import Reward

SAMPLES = str(Path(__file__).with_name("samples.py"))
ROOT = Path(__file__).parents[3]


def score(rewards, prompts, completions, columns, timeout=30.0):
    with Scorer(rewards, timeout) as scorer:
        return scorer(prompts, completions, columns)


def run(name, completions, columns=None, timeout=20.0, **fields):
    prompts = ["p"] * len(completions)
    return score(
        [Reward(path=f"{SAMPLES}:{name}", **fields)], prompts, completions, columns or {}, timeout
    )


def test_weights_parts_and_options():
    rewards = [
        Reward(path=f"{SAMPLES}:parts", weight=2.0, options={"bonus": 0.5}),
        Reward(path="exact_match", name="em", weight=-1.0),
    ]
    result = score(rewards, ["p"] * 2, ["a", "b"], {"answer": ["a", "a"]})
    assert result.total.tolist() == [2.0, 1.0]
    assert set(result.parts) == {"parts", "parts/right", "parts/often", "em"}
    assert result.parts["parts/right"].tolist() == [1, 0]
    assert result.parts["parts/often"].isnan().all()
    assert not result.failed.any() and not result.errors


@pytest.mark.parametrize("timeout", [20.0, None], ids=["worker", "this process"])
@pytest.mark.parametrize("bad", ["raise", "nan", "inf", "none", "text"])
def test_a_bad_sample_costs_itself_alone(bad, timeout, caplog):
    result = run("moody", ["a", bad, "ccc"], timeout=timeout, weight=2.0)
    assert result.failed.tolist() == [False, True, False]
    assert result.total.tolist() == [2.0, 0.0, 6.0]
    assert math.isnan(result.parts["moody"][1])
    (error,) = result.errors
    assert error.row == 1 and {"raise": "boom", "text": "why"}.get(
        bad, bad.title()[:3].lower()
    ) in (error.message.lower())
    assert "sample 1" in caplog.text


@pytest.mark.parametrize("bad", ["hang", "spin", "child", "die", "crash", "exit"])
def test_a_hanging_or_dying_reward_costs_its_sample_alone(bad):
    with Scorer([Reward(path=f"{SAMPLES}:moody")], timeout=1.2) as scorer:
        start = time.monotonic()
        result = scorer(["p"] * 4, ["a", "bb", bad, "cccc"], {})
        assert time.monotonic() - start < 30
        assert result.failed.tolist() == [False, False, True, False]
        assert result.total.tolist() == [1, 2, 0, 4]
        again = scorer(["p"], ["aaa"], {})
        assert again.total.tolist() == [3] and not again.failed.any()


def test_a_reward_that_always_hangs_is_given_up():
    start = time.monotonic()
    result = run("moody", ["hang"] * 500, timeout=0.2)
    assert time.monotonic() - start < 60, "not 500 times 0.2 s"
    assert result.failed.all() and len(result.errors) == 500
    assert "not scored" in result.errors[-1].message
    assert result.errors[0].message == "no reply in 0.1 s (the whole batch: no reply in 0.2 s)"


@pytest.mark.parametrize(
    "name, message",
    [
        ("wrong_length", "got 1 values for 3 completions"),
        ("wrong_type", "got the float 1.0, expected a list of 3 numbers"),
    ],
)
def test_a_result_that_is_no_list_of_all_samples_is_an_error_of_all(name, message):
    result = run(name, ["a", "b", "c"])
    assert result.failed.all() and message in result.errors[2].message


ODD = {
    "text": "got the text 'good', expected a list of 3 numbers, one per completion",
    "texts": "got the text '0.9', expected a number",
    "nothing": "got None, expected a list of 3 numbers, one per completion",
    "bool": "got the bool True, expected a list of 3 numbers, one per completion",
    "dict": """got a dict of ['score'], expected the key "reward" in it""",
    "part": "part 'style': got the text 'fine', expected a list of 3 numbers, one per completion",
    "huge": "expected a number",
    "matrix": "got the list [1.0, 1.0], expected a number",
    "generator": "expected a list of 3 numbers, one per completion",
    "lines": "got the text 'first\\nsecond', expected a number",
}


@pytest.mark.parametrize("kind", ODD)
def test_what_a_reward_returns_instead_is_one_line_that_names_it(kind, caplog):
    result = run("odd", ["a", "b", "c"], {"kind": [kind] * 3}, timeout=None)
    assert result.failed.all()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("reward odd failed on all 3 samples: ") and "\n" not in line
    assert ODD[kind] in line and len(line) < 400


def test_truth_values_are_numbers():
    assert run("odd", ["a"], {"kind": ["bools"]}, timeout=None).total.tolist() == [1.0]


@pytest.mark.parametrize("timeout", [20.0, None], ids=["worker", "this process"])
def test_a_reward_that_exits_ends_nothing(timeout):
    result = run("quits", ["a", "b"], timeout=timeout)
    assert result.failed.all() and "SystemExit: 0" in result.errors[0].message


def test_an_error_of_several_lines_is_told_in_one():
    with Scorer([Reward(path=f"{SAMPLES}:scolds")], timeout=None) as scorer:
        assert scorer.last_error is None
        scorer(["p"] * 2, ["a", "b"], {})
    assert scorer.last_error.startswith("reward scolds: ValueError: one line and another (")


def test_one_bad_reward_of_two_fails_the_sample_but_keeps_the_other_part():
    rewards = [Reward(path=f"{SAMPLES}:moody"), Reward(path="exact_match")]
    result = score(rewards, ["p"] * 2, ["a", "raise"], {"answer": ["a", "raise"]})
    assert result.total.tolist() == [2.0, 0.0]
    assert result.parts["exact_match"].tolist() == [1.0, 1.0]


def test_the_limit_is_of_the_batch(caplog):
    """A hang is looked for within as long again, and what was spent is told."""
    with Scorer([Reward(path=f"{SAMPLES}:leisurely")], timeout=1.0) as scorer:
        start = time.monotonic()
        result = scorer(["p"] * 40, ["a"] * 40, {})  # 4 seconds of work
        assert time.monotonic() - start < 6, "two seconds, and a few workers' start"
    assert 0 < result.failed.sum() < 40, "samples that were scored in time count"
    assert not result.failed[0] and result.failed[-1]
    assert "not scored: the batch's time was up" in result.errors[-1].message
    assert re.search(
        r"reward leisurely took \d\.\d s for a batch of 40 .* over the limit of 1 s", caplog.text
    )


def test_a_hang_is_told_while_it_lasts(caplog, monkeypatch):
    monkeypatch.setattr("dgrpo.longblocks.rewards.process.TELL", 0.2)
    run("moody", ["hang"], timeout=1.0)
    told = [r.getMessage() for r in caplog.records if "no reply for" in r.getMessage()]
    assert told == [
        "reward moody: no reply for 0.2 s (limit 1 s)",
        "reward moody: no reply for 0.4 s (limit 1 s)",
        "reward moody: no reply for 0.8 s (limit 1 s)",
    ]


def test_the_worker_is_light_and_takes_arrays():
    assert run("imported", ["a"]).total.tolist() == [0]
    assert score(
        [Reward(path="exact_match"), Reward(path=f"{SAMPLES}:imported")],
        ["p"],
        ["a"],
        {"answer": ["b"]},
    )[0].tolist() == [0]
    assert run("arrays", ["a", "b"]).total.tolist() == [0.25, 0.25]


def test_math_verify_works_in_the_worker():
    result = score(
        [Reward(path="math")], ["p"] * 2, [r"\boxed{\frac12}", "3"], {"answer": ["0.5", "4"]}
    )
    assert result.total.tolist() == [1, 0]


def test_thousands_of_samples_with_a_long_document_are_cheap():
    document = "words " * 200_000
    columns = {"answer": ["a"] * 4096, "document": [document] * 4096}
    with Scorer([Reward(path="exact_match")]) as scorer:
        start = time.monotonic()
        assert scorer(["p"] * 4096, ["a"] * 4096, columns).total.sum() == 4096
        assert time.monotonic() - start < 20, "the document is sent once"


def test_odd_columns_arrive():
    import datetime

    import numpy

    values = [numpy.arange(3), "é\ud800\n", [1, None, {"a": 2}], datetime.date(2020, 1, 2)]
    result = run("echo", list("abcd"), {"column": values})
    assert result.parts["echo/size"].tolist() == [3, 3, 3, 10]


def test_no_samples():
    result = run("moody", [])
    assert result.total.shape == (0,) and result.failed.shape == (0,)


@pytest.mark.parametrize(
    "path, message",
    [
        ("exact", "no function 'exact', expected one of .*exact_match"),
        ("no_such.module:f", "No module named 'no_such'"),
        ("folder/absent.py:f", "No such file"),
        (f"{SAMPLES}:absent", "no function 'absent', expected one of .*moody"),
    ],
)
@pytest.mark.parametrize("timeout", [20.0, None], ids=["worker", "this process"])
def test_a_reward_that_cannot_be_imported_stops_at_once(path, message, timeout):
    with pytest.raises(ValueError, match=message):
        Scorer([Reward(path=path)], timeout=timeout)


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected one or more with different names"):
        Scorer([Reward(path="math"), Reward(path="math")])
    with pytest.raises(ValueError, match="answer: got 1 values for 2 completions"):
        score([Reward(path="exact_match")], ["p", "p"], ["a", "b"], {"answer": ["a"]})


def test_a_killed_worker_is_replaced():
    with Scorer([Reward(path=f"{SAMPLES}:pid")]) as scorer:
        first = int(scorer(["p"], ["a"], {}).parts["pid"][0])
        os.kill(scorer._worker.process.pid, signal.SIGKILL)
        scorer._worker.process.wait()
        result = scorer(["p"], ["a"], {})
        assert not result.failed.any() and int(result.parts["pid"][0]) != first


HOST = """
import sys
from dgrpo.extras import load_function
from dgrpo.longblocks.rewards.runner import Scorer
from dgrpo.trainer.config import Reward
scorer = Scorer([Reward(path=sys.argv[1])], timeout=100)  # at the top level: no main guard needed
print(scorer._worker.process.pid, flush=True)
scorer(["p"], ["hang"], {})
"""


def test_the_worker_ends_with_its_host_even_while_it_hangs(tmp_path):
    script = tmp_path / "host.py"
    script.write_text(HOST)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    host = subprocess.Popen(
        [sys.executable, script, f"{SAMPLES}:moody"],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = int(host.stdout.readline())
    time.sleep(0.3)
    host.kill()
    host.wait()
    host.stdout.close()
    for _ in range(50):
        if not Path(f"/proc/{worker}/cmdline").exists() or _is_zombie(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its host")


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    source = "def one(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n"
    (tmp_path / "reward_lying_here.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    function = load_function("reward", "reward_lying_here:one")
    assert function(["p"], ["c"]) == [1.0]
    with Scorer([Reward(path="reward_lying_here:one")]) as scorer:
        assert scorer(["p"], ["c"], {}).total.tolist() == [1.0]
