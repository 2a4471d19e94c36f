"""The comparison of methods: its plan, its processes, and a small one from end to end."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from examples.compare import __main__ as compare
from examples.compare import figures, pool, raw, tables
from examples.compare.plan import HERE, Plan, family

METHODS = {"sft", "kd", "grpo", "opd", "dgrpo"}

SMALLEST = """
out: runs/compare
compare: {seeds: [1, 2], rates: {sft: [1e-3], dgrpo: [1e-3, 2e-3]}, prompts: 4, test: 8}
epochs: null
steps: 2
device: cpu
data: {sources: [{path: runs/compare/answers.jsonl, where: {extra: false}}]}
method: {preset: sft}
batch: {prompts: 2, tokens: 2048}
rollout: {group_size: 2, max_tokens: 5}
rewards: {functions: [{path: final_number}], timeout: null}
head: {memory_budget: 16777216}
optimizer: {lr: 1e-3, warmup_steps: 1}
evaluate:
  sources:
    - path: dgrpo.longblocks.tasks.chains:rows
      options: &task
        {tokenizer: runs/compare/tokenizer, count: 4, split: validation, tokens: 64, chains: 2}
  count: 4
  every: 1
log: {progress: false}
stages:
  - name: teacher-1
    model: &random
      tokenizer: runs/compare/tokenizer
      config: {model_type: qwen3, vocab_size: 576, hidden_size: 32, intermediate_size: 32,
        num_hidden_layers: 1, num_attention_heads: 1, num_key_value_heads: 1, head_dim: 32,
        tie_word_embeddings: true, eos_token_id: 0, pad_token_id: 1, bos_token_id: null}
    data: &gold
      {sources: [{path: "dgrpo.longblocks.tasks.chains:rows", options: {<<: *task, split: train}}]}
  - {name: base-1, model: *random, data: *gold}
  - {name: cold, model: {name: "stage:base-1"}}
  - {name: sft, model: {name: "stage:cold"}}
  - name: dgrpo
    model: {name: "stage:cold"}
    method: {preset: dgrpo}
    teacher: {name: "stage:teacher-1"}
    batch: {updates: 2}
  - name: dgrpo-no-cold
    model: {name: "stage:base-1"}
    method: {preset: dgrpo}
    teacher: {name: "stage:teacher-1"}
    batch: {updates: 2}
"""


@pytest.fixture
def smallest(tmp_path):
    path = tmp_path / "smallest.yaml"
    path.write_text(SMALLEST)
    return path


def in_this_process(calls):
    """`pool.run` without processes; notes the names of the jobs that it ran."""

    def run(title, jobs, workers):
        for job in jobs:
            if not job.done:
                calls.append(job.name)
                assert job.function(*job.arguments)
        return True

    return run


# The sizes that are there


@pytest.fixture(scope="module", params=["small", "gpu"])
def plan(request, tmp_path_factory):
    return Plan(HERE / f"{request.param}.yaml", tmp_path_factory.mktemp("plan"))


def test_every_method_has_the_same_student_teacher_prompts_and_number_of_updates(plan):
    rates = {name: 1e-3 for name in plan.compare.rates}
    first = plan.run("sft", 1, rates)
    teacher = plan.run("dgrpo", 1, rates).teacher.name
    for method in plan.methods:
        run = plan.run(method, 1, rates)
        own = run.method.sequences == "rollout"
        completions = run.batch.prompts * (run.rollout.group_size if own else 1)
        assert completions / run.batch.updates == first.batch.prompts, method
        if method != "sft-long":
            assert run.steps == first.steps, method
        if run.method.teacher == "model":
            assert run.teacher.name == teacher, method
        if not method.endswith("-4x"):
            assert run.data.sources[0].where["extra"] is False, method
        assert run.evaluate == first.evaluate and run.rewards == first.rewards, method
        no_cold = method.endswith("-no-cold")
        assert ("/cold/seed-1/" in run.model.name) != no_cold, method


def test_the_arms_that_the_comparison_is_about_are_there(plan):
    rates = {name: 1e-3 for name in plan.compare.rates}
    runs = {method: plan.run(method, 1, rates).method for method in plan.methods}
    assert METHODS <= set(runs) and {f"{m}-no-cold" for m in METHODS} <= set(runs)
    assert len(plan.compare.seeds) >= 3 and plan.compare.test >= 2000
    coefficients = {m.teacher_coef for n, m in runs.items() if n.startswith(("grpo", "dgrpo"))}
    assert {0.0, 0.1, 0.5, 1.0} <= coefficients
    assert runs["dgrpo-sampled"].objective == "kdrl" and runs["dgrpo-self"].teacher == "self"
    assert set(plan.compare.rates) == METHODS
    assert all(len(rates) >= 3 for rates in plan.compare.rates.values())


def test_seeds_differ_in_their_cold_start_and_share_the_base(plan):
    rates = {name: 1e-3 for name in plan.compare.rates}
    one, two = (plan.run("dgrpo", seed, rates) for seed in (1, 2))
    assert one.model.name != two.model.name and one.out != two.out and one.seed != two.seed
    assert plan.cold(1).model == plan.cold(2).model
    assert plan.run("dgrpo-no-cold", 1, rates).model == plan.run("grpo-no-cold", 2, rates).model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("compare.rate_seed=2", "compare.rate_seed: got 2, expected none of the seeds"),
        ("compare.seeds=[]", "compare.seeds"),
        ("compare.sedes=[1]", "compare.sedes"),
        ("compare.rates={sft: [1e-3]}", "compare.rates: got none for ['dgrpo']"),
        ("stages.sft.steps=0", "stages.sft.steps"),
    ],
)
def test_a_wrong_setting_is_named(smallest, tmp_path, change, named):
    with pytest.raises(ValueError) as error:
        Plan(smallest, tmp_path / "out", [change])
    assert named in str(error.value)


def test_the_family_is_the_name_up_to_the_first_dash():
    assert [family(name) for name in ("dgrpo", "dgrpo-beta-0_1", "sft-4x")] == [
        "dgrpo",
        "dgrpo",
        "sft",
    ]


# From beginning to end


def test_a_whole_comparison_is_resumed_run_by_run_and_reported(
    smallest, tmp_path, monkeypatch, capsys
):
    calls: list[str] = []
    monkeypatch.setattr(pool, "run", in_this_process(calls))
    arguments = ["--size", str(smallest), "--out", str(tmp_path / "runs")]
    arguments += ["--results", str(tmp_path / "results")]
    assert compare.main(arguments) == 0, capsys.readouterr().err
    runs = [f"{m}-seed-{s}" for m in ("sft", "dgrpo", "dgrpo-no-cold") for s in (1, 2)]
    assert set(runs) < set(calls) and calls.count("cold-0") == 1

    found = raw.read(tmp_path / "results")
    assert set(found.methods) == {"sft", "dgrpo", "dgrpo-no-cold"}
    assert found.about["rates"]["chosen"]["dgrpo"] in (1e-3, 2e-3)
    for method in found.methods:
        assert tables.right(found, method, "greedy").shape == (2, 8)
        assert tables.right(found, method, "sampled").shape == (2, 4)
        last = found.metrics[f"{method}/seed-2"][-1]
        assert last["step"] == 2 and last["completion_tokens"] > 0 and last["seconds"] > 0
        places, values = figures.curve(found, method, "updates")
        assert places == ([0, 1, 2] if method.endswith("-no-cold") else [2, 3, 4])
        assert all(0 <= value.low <= value.mean <= value.high <= 1 for value in values)
    rows = [json.loads(x) for x in (tmp_path / "runs" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and sum(not row["extra"] for row in rows) == 4

    # A second time nothing is run; without one run, that one alone is.
    calls.clear()
    assert compare.main(arguments) == 0 and calls == []
    (tmp_path / "runs" / "methods" / "sft" / "seed-2" / "done.yaml").unlink()
    assert compare.main(arguments) == 0 and calls == ["sft-seed-2"]

    # Other settings over the same folder would mix two comparisons.
    assert compare.main([*arguments, "stages.dgrpo.steps=4"]) == 2
    error = capsys.readouterr().err
    assert "methods/dgrpo/seed-1 holds a run with other settings" in error or "rates/" in error


def test_no_results_are_an_error_with_the_file(tmp_path, capsys):
    assert compare.main(["--report", "--results", str(tmp_path)]) == 2
    assert "about.json" in capsys.readouterr().err


# Processes


def write_and_wait(path: Path, seconds: float) -> bool:
    """A job: notes that it began, and ends well where no signal comes."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    path.write_text("began")
    return not stop.wait(seconds)


def fail() -> bool:
    raise ValueError("no such luck")


def test_the_pool_runs_all_jobs_and_names_those_that_failed(tmp_path, capsys):
    jobs = [
        pool.Job("bad", fail, (), tmp_path / "bad.txt"),
        pool.Job("good", write_and_wait, (tmp_path / "good", 0.0), tmp_path / "good.txt"),
        pool.Job("old", fail, (), tmp_path / "old.txt", done=True),
    ]
    with pytest.raises(pool.Failed, match="bad: ValueError: no such luck"):
        pool.run("two jobs", jobs, workers=2)
    assert (tmp_path / "good").exists() and not (tmp_path / "old.txt").exists()
    assert "2 of 3 to run" in capsys.readouterr().out


def test_a_signal_goes_on_to_the_jobs_and_ends_the_pool(tmp_path):
    jobs = [
        pool.Job("long", write_and_wait, (tmp_path / "began", 60.0), tmp_path / "long.txt"),
        pool.Job("never", fail, (), tmp_path / "never.txt"),
    ]

    def interrupt() -> None:
        while not (tmp_path / "began").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    start = time.monotonic()
    assert pool.run("jobs", jobs, workers=1) is False
    assert time.monotonic() - start < 50 and not (tmp_path / "never.txt").exists()
    thread.join()
