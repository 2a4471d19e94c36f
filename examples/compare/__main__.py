"""The methods compared on one task, one student and one teacher, from scratch:

    python -m examples.compare                    # small.yaml on two cores: about two hours
    python -m examples.compare --size gpu         # gpu.yaml on one GPU
    python -m examples.compare --report           # figures and tables from the committed results

The order: tokenizer; teacher and base student side by side; the teacher's answers; a cold start a
seed; for each method some learning rates, chosen on validation prompts with a seed of their own;
then every method once per seed, scored on the test prompts. Interrupted, the same command goes on,
and a finished run is not run again. What it leaves behind is in results/SIZE/: the metrics of every
run, the scores of every test prompt, tables and figures; docs/comparison.md reads them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.trainer import finished
from dgrpo.trainer.config import RunSettings, dump
from examples.compare import figures, pool, raw, tables, work
from examples.compare.plan import HERE, Plan

ANSWERS, RATES = "answers.jsonl", "rates.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not finished and writes the results; 0, 130 where interrupted, 1 or 2 wrong."""
    parser = argparse.ArgumentParser(prog="python -m examples.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the size's file")
    parser.add_argument("--size", default="small", help="small, gpu, or a file like small.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the results (results/SIZE)")
    parser.add_argument("--report", action="store_true", help="only figures and tables again")
    options = parser.parse_args(argv)
    file = Path(options.size) if options.size.endswith(".yaml") else HERE / f"{options.size}.yaml"
    results = options.results or HERE / "results" / file.stem
    try:
        if not options.report:
            plan = Plan(file, options.out, options.overrides)
            if not run(plan):
                print("\nstopped; the same command goes on from here")
                return pool.STOPPED
            raw.collect(plan, chosen(plan), results)
        report(results)
    except pool.Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(results: Path) -> None:
    """Tables and figures from what lies in the folder of the results."""
    found = raw.read(results)
    text = tables.write(found, results)
    figures.draw(found, results)
    print(f"\n{text}\nresults: {results}")


def run(plan: Plan) -> bool:
    """All runs of the plan in their order; False where a signal stopped them."""
    refuse_other_settings(plan)
    out, compare, workers = plan.out, plan.compare, plan.compare.workers
    if not (out / "tokenizer").exists():
        train_tokenizer().save_pretrained(out / "tmp-tokenizer")
        os.rename(out / "tmp-tokenizer", out / "tokenizer")

    def train(name: str, *stages: RunSettings) -> pool.Job:
        named = {Path(stage.out).name: stage for stage in stages}
        done = all(map(finished, stages))
        return pool.Job(name, work.train, (named,), out / "logs" / f"{name}.txt", done)

    def score(name: str, stage: RunSettings) -> pool.Job:
        done = (Path(stage.out) / work.SCORES).exists()
        arguments = (stage, plan.task, compare.test)
        return pool.Job(f"{name}-test", work.score, arguments, out / "logs" / f"{name}.txt", done)

    models = {n: [plan.stages[s] for s in names] for n, names in plan.shared.items()}
    if not pool.run("shared models", [train(n, *stages) for n, stages in models.items()], workers):
        return False
    teacher, answers = models["teacher"][-1], out / ANSWERS
    arguments = (teacher, plan.task, compare.prompts, answers)
    log = out / "logs" / "answers.txt"
    jobs = [pool.Job("answers", work.answer, arguments, log, answers.exists())]
    jobs += [score(name, stages[-1]) for name, stages in models.items()]
    if not pool.run("the teacher's answers", jobs, workers):
        return False
    seeds = [compare.rate_seed, *compare.seeds]
    jobs = [train(f"cold-{seed}", plan.cold(seed)) for seed in seeds]
    if not pool.run("cold starts", jobs, workers):
        return False
    jobs = [train(f"{name}-{rate:g}", s) for (name, rate), s in plan.candidates().items()]
    if not pool.run("learning rates", jobs, workers):
        return False
    rates = chosen(plan)
    print(f"\nlearning rates: {rates}", flush=True)
    jobs = [score(f"cold-{seed}", plan.cold(seed)) for seed in compare.seeds]
    for seed in compare.seeds:
        for method in plan.methods:
            stage, name = plan.run(method, seed, rates), f"{method}-seed-{seed}"
            path = Path(stage.out) / work.SCORES
            arguments = (stage, plan.task, compare.test)
            done = finished(stage) and path.exists()
            log = out / "logs" / f"{name}.txt"
            jobs.append(pool.Job(name, work.train_and_score, arguments, log, done))
    return pool.run("methods", jobs, workers)


def chosen(plan: Plan) -> dict[str, float]:
    """The learning rate of each family: the best on the validation prompts. Kept in a file."""
    tried = {
        f"{name} {rate:g}": raw.metrics(stage)[-1][raw.REWARD]
        for (name, rate), stage in plan.candidates().items()
    }
    rates = {
        name: max(rates, key=lambda rate, name=name: tried[f"{name} {rate:g}"])
        for name, rates in plan.compare.rates.items()
    }
    (plan.out / RATES).write_text(json.dumps({"chosen": rates, "tried": tried}, indent=1))
    return rates


def refuse_other_settings(plan: Plan) -> None:
    """Raises ValueError where a folder holds a run with other settings: it would be mixed in."""
    rates = chosen(plan) if all(map(finished, plan.candidates().values())) else None
    seeds = plan.compare.seeds
    stages = [s for names in plan.shared.values() for s in map(plan.stages.get, names)]
    stages += [plan.cold(seed) for seed in [plan.compare.rate_seed, *seeds]]
    stages += plan.candidates().values()
    if rates:
        stages += [plan.run(method, seed, rates) for method in plan.methods for seed in seeds]
    for stage in stages:
        file = Path(stage.out) / "settings.yaml"
        if file.exists() and file.read_text() != dump(stage):
            raise ValueError(
                f"--out: {stage.out} holds a run with other settings, expected the same ones; "
                "remove that folder and those of the runs after it, or give another --out"
            )


if __name__ == "__main__":
    sys.exit(main())
