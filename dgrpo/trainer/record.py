"""What is recorded of a step: metrics, samples to read, held-out scores, a profile."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from dgrpo.distributed import ranks
from dgrpo.trainer.collect import decode, reward, sampling, timed
from dgrpo.trainer.config.run import EVALUATION
from dgrpo.trainer.folder import last_lines, write
from dgrpo.trainer.metrics import StepMetrics, rollout_record, write_rollouts
from dgrpo.trainer.run import IN_A_ROW, Batch, Learned, Run
from dgrpo.trainer.teachers import ServedTeacher
from dgrpo.trainer.update import coefficients

HALF = math.log(0.5)
SCORE = "evaluation/reward"


def record(run: Run, batch: Batch) -> None:
    """One line of metrics, samples now and then, held-out scores when due. COLLECTIVE."""
    state, settings = run.state, run.settings
    if run.history is not None:
        run.history.keep(state.step - 1)
    means = StepMetrics()
    measure_tokens(run, batch, means)
    measure_samples(run, batch, means)
    seconds, run.clock = time.perf_counter() - run.clock, time.perf_counter()
    for verb, value in batch.seconds.items():
        means.mean(f"time/{verb}", value)
    means.mean("time/step", seconds)
    means.sum("tokens", batch.tokens)
    means.max("memory/peak_gib", peak_bytes(run.device) / 2**30)
    if isinstance(run.teacher, ServedTeacher):
        means.sum("teacher_missing", run.teacher.missing)
    metrics = {
        "loss": batch.loss,
        "grad_norm": batch.norm,
        "lr": batch.lr,
        "skipped": state.skipped,
        **means.reduce(),
    }
    metrics["time/tokens_per_second"] = metrics["tokens"] / max(seconds, 1e-9)
    if run.teacher is not None:
        metrics["teacher_coef"] = coefficients(run, state.step - 1)["teacher_coef"]
    bounds = metrics.pop("reward_min", None), metrics.pop("reward_max", None)
    run.recent.append(Learned(batch.loss, batch.norm, *bounds))
    watch(run, metrics)
    for warning in standstill(run.recent):
        run.log.message(f"step {state.step}: warning: {warning}")
    every = settings.evaluate.every
    if every and state.step % every == 0:
        metrics |= evaluate(run)
    run.log.total_steps = run.expected_steps()
    run.log.log(state.step, metrics)
    if settings.log.samples and (state.step - 1) % settings.log.samples_every == 0:
        write_samples(run, batch)


def measure_tokens(run: Run, batch: Batch, means: StepMetrics) -> None:
    """Means over the tokens with loss of all ranks, from what the loss head returned."""
    for micro, out in batch.outputs:
        rows = micro.rows

        def mean(name: str, values: Tensor, rows: Tensor = rows) -> None:
            means.mean(name, values.reshape(-1)[rows].float())

        mean("nll", -out.logprobs)
        # More than half of the mass is surely the likeliest token: a lower bound of the accuracy.
        mean("token_accuracy", out.logprobs > HALF)
        mean("entropy", out.entropy)
        if run.teacher is not None:
            mean("divergence", out.divergence)
        for name, values in out.metrics.items():
            mean(name, values)
        if not run.sampled:
            continue
        # How far the sampler's log-probabilities are from the trainer's of the same weights.
        for place, values in micro.per_sample(out.logprobs):
            sample = batch.samples[place]
            ours = values if sample.old_logprobs is None else sample.old_logprobs
            gap = (ours - sample.sampled.logprobs).abs()[sample.mask]
            means.mean("sampler_mismatch", gap)
            means.max("sampler_mismatch_max", gap.max() if gap.numel() else 0.0)


def measure_samples(run: Run, batch: Batch, means: StepMetrics) -> None:
    """Rewards, lengths and cuts of the step's completions."""
    for sample in batch.samples:
        means.mean("completion_length", float(len(sample.completion_ids)))
        means.mean("prompt_length", float(len(sample.prompt_ids)))
        if not run.sampled:
            continue
        result, scored = sample.scored, float(not sample.scored.failed)
        means.mean("reward", result.reward, scored)
        if scored:  # for the warnings
            means.min("reward_min", result.reward)
            means.max("reward_max", result.reward)
        for name, value in result.parts.items():
            known = not math.isnan(value)
            means.mean(f"reward/{name}", value if known else 0.0, float(known))
        means.mean("reward_failed", 1.0 - scored)
        means.mean("truncated", float(sample.sampled.truncated))
        means.mean("advantage", float(sample.advantages.abs().mean()))


def standstill(recent: Sequence[Learned]) -> Iterator[str]:
    """Warnings of a run that learns nothing, at the last of `IN_A_ROW` such steps.

    `recent` holds one step more, so that each stretch of them is told once.
    """

    def begins(values: list) -> bool:
        before, last = values[:-IN_A_ROW], values[-IN_A_ROW:]
        return last == [last[-1]] * IN_A_ROW and last[-1] is not None and before != last[:1]

    reward = recent[-1].lowest
    if begins([step.lowest if step.lowest == step.highest else None for step in recent]):
        yield (
            f"every reward of {IN_A_ROW} steps in a row is {reward:g}, which tells no completion "
            "from another; look at the reward, and whether the prompts are too hard or too easy"
        )
    if begins([True if step.loss == step.norm == 0.0 else None for step in recent]):
        yield (
            f"loss and gradient are exactly 0 in {IN_A_ROW} steps in a row: nothing is learned; "
            "no sample has an advantage, a teacher or a token with loss"
        )


def watch(run: Run, metrics: dict[str, float]) -> None:
    """Move the average that `until` looks at."""
    until, state = run.settings.until, run.state
    if until is None:
        return
    if until.metric not in metrics:
        raise ValueError(
            f"until.metric: got {until.metric!r}, expected a logged one: {sorted(metrics)}"
        )
    value = metrics[until.metric]
    before = value if state.average is None else state.average
    state.average = before * until.smoothing + value * (1 - until.smoothing)


def write_samples(run: Run, batch: Batch) -> None:
    """The step's first completions, with the values of each token, for the report."""
    wanted = -(-run.settings.log.samples // ranks().data_world)
    values: dict[int, dict[str, Tensor]] = {}
    for micro, out in batch.outputs:
        fields = {
            "logprob": out.logprobs,
            "teacher_logprob": out.teacher_logprobs,
            "divergence": out.divergence,
            "entropy": out.entropy,
            "ratio": out.metrics.get("ratio"),
            "clipped": out.metrics.get("clipped"),
        }
        for name, tensor in fields.items():
            for place, own in [] if tensor is None else micro.per_sample(tensor):
                values.setdefault(place, {})[name] = own
    records = []
    for place, sample in enumerate(batch.samples[:wanted]):
        zeros = torch.zeros(len(sample.completion_ids))
        own = {
            "advantage": zeros if sample.advantages is None else sample.advantages,
            "loss": sample.mask,
            "clipped": zeros.bool(),
            **values[place],
        }
        records.append(rollout_record(run.tokenizer, run.state.step, sample, own))
    write_rollouts(run.folder, run.state.step, records)


def evaluate(run: Run) -> dict[str, float]:
    """Scores of the held-out prompts, and each one's in a file of the run. COLLECTIVE."""
    settings, step = run.settings.evaluate, run.state.step
    if not settings.sources:
        return {}
    how = replace(sampling(run), step=0)
    if settings.max_tokens is not None:
        how = replace(how, max_tokens=settings.max_tokens)
    if settings.greedy:
        how = replace(how, temperature=0.0)
    prompts, means, seconds = run.held_out, StepMetrics(), {}
    keys = [f"held-out {prompt.index}" for prompt in prompts]
    with timed(seconds, "evaluation"):
        drawn = run.sampler.generate([prompt.ids for prompt in prompts], 1, how, keys=keys)
        texts = decode(run, drawn)
        result = reward(run, prompts, drawn, texts, 1)
    lines = []
    for i, prompt in enumerate(prompts):
        scored = float(not result.failed[i])
        means.mean(SCORE, float(result.total[i]), scored)
        means.mean("evaluation/completion_length", float(len(drawn[i].completion_ids)))
        row = {"index": prompt.index, "id": prompt.id, "source": prompt.source}
        row |= {"reward": float(result.total[i]) if scored else None, "completion": texts[i]}
        lines.append(json.dumps(row, ensure_ascii=False))
    means.mean("time/evaluation", seconds["evaluation"])
    run.clock += seconds["evaluation"]  # no part of the next step's time
    path = run.folder / EVALUATION / f"step-{step:08d}-{ranks().rank:05d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, "".join(line + "\n" for line in lines))
    found = means.reduce()
    if SCORE not in found:
        run.log.message(
            f"step {step}: warning: no held-out completion has a reward, last error: "
            f"{run.scorer.last_error or 'on another rank'}"
        )
    if ranks().totals([run.interrupted])[0] > 0:
        run.stopping = True  # an evaluation is long: not one more step
    return found


def evaluated(run: Run) -> bool:
    """Whether the metrics already hold the held-out scores of this step. COLLECTIVE."""
    lines = last_lines(run.folder) if ranks().first else []
    found = any(line["step"] == run.state.step and SCORE in line for line in lines)
    return ranks().totals([found])[0] > 0


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def profiled(run: Run) -> Iterator[torch.profiler.profile | None]:
    """A profiler over the steps of `log.profile_steps`, to be stepped once per step.

    Writes a trace, the operators by memory, and on a GPU a memory snapshot into `profile/`.
    """
    steps = run.settings.log.profile_steps
    if steps is None or run.state.step >= steps[1]:
        yield None
        return
    folder = run.folder / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    cuda, rank = run.device.type == "cuda", ranks().rank

    def keep(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / f"trace-{rank:05d}.json"))
        key = "self_cuda_memory_usage" if cuda else "self_cpu_memory_usage"
        table = profile.key_averages().table(sort_by=key, row_limit=50)
        (folder / f"memory-{rank:05d}.txt").write_text(table)
        if cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"memory-{rank:05d}.snapshot"))

    before = max(0, steps[0] - 1 - run.state.step)
    schedule = torch.profiler.schedule(
        wait=max(0, before - 1),
        warmup=min(1, before),
        active=steps[1] - run.state.step - before,
        repeat=1,
    )
    if cuda:
        torch.cuda.memory._record_memory_history()
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=keep, profile_memory=True, record_shapes=True
    ) as profile:
        yield profile
