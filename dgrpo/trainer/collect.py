"""What a step trains on: prompts become groups of rollouts, rewards, advantages; or given texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import record_function

from dgrpo.data import Prompt, Source
from dgrpo.distributed import ranks
from dgrpo.longblocks.rewards.runner import RewardResult
from dgrpo.objectives import (
    group_advantages,
    masked_importance_weights,
    truncated_importance_weights,
)
from dgrpo.trainer.attempts import Attempt
from dgrpo.trainer.batch import Origin, Sample, Sampled, Scored, balanced_count
from dgrpo.trainer.policy import PolicyModel, fsdp
from dgrpo.trainer.rollout import Rollout, Sampling
from dgrpo.trainer.run import Batch, Run
from dgrpo.trainer.seeds import call_seed, seeded


def collect(run: Run) -> Batch | None:
    """The samples of the next optimiser step: of the batch at hand, or of new prompts.

    None at the end of the run: steps done, data used up, or asked to stop. COLLECTIVE.
    """
    if run.finished():
        return None
    while not run.pending:
        seconds: dict[str, float] = {}
        first = run.stream.index
        prompts = run.stream.batch(run.settings.batch.prompts)
        if run.stream.index == first:
            return None
        with timed(seconds, "rollout"):
            samples = rollouts(run, prompts, seconds) if run.sampled else given(prompts)
        with timed(seconds, "score"):
            score(run, samples)
        run.pending = split(run, samples, run.stream.index - first, first)
        if run.pending:
            run.pending[0].seconds = seconds
    return run.pending.pop(0)


def given(prompts: Sequence[Prompt]) -> list[Sample]:
    """The completions that the data hold, for SFT and distillation on given texts."""
    return [
        Sample(
            prompt.ids,
            prompt.completion_ids,
            loss_mask=prompt.loss_mask,
            group=prompt.index,
            origin=Origin(prompt.source, prompt.id),
        )
        for prompt in prompts
    ]


def rollouts(run: Run, prompts: Sequence[Prompt], seconds: dict[str, float]) -> list[Sample]:
    """Completions of the policy with rewards, advantages and views of the teacher. COLLECTIVE.

    The time of the rewards goes to `seconds`.
    """
    settings, step = run.settings, run.state.step
    n, method = settings.rollout.group_size, settings.method
    run.sampler.update(fsdp.full_tensors(run.model), step)
    keys = [prompt.index for prompt in prompts]
    drawn = run.sampler.generate([prompt.ids for prompt in prompts], n, sampling(run), keys=keys)
    texts = decode(run, drawn)
    with timed(seconds, "reward"):
        result = reward(run, prompts, drawn, texts, n, needed=run.reads_rewards)
    count_failed(run, result)
    cut = torch.tensor([r.finish_reason == "length" for r in drawn], dtype=torch.bool)
    rewards = result.total.clone()
    if method.truncated == "penalise":
        rewards -= method.truncation_penalty * cut
    advantages = torch.zeros(len(drawn))
    if method.advantage == "group" and drawn:
        advantages = group_advantages(
            rewards,
            torch.arange(len(prompts)).repeat_interleave(n),
            scale=method.advantage_scale,
            leave_one_out=method.leave_one_out,
            valid=~result.failed,
        )
    samples = []
    for place, rollout in enumerate(drawn):
        prompt, shape = prompts[place // n], rollout.completion_ids.shape
        keep = method.truncated != "mask" or not cut[place]
        parts = {name: float(values[place]) for name, values in result.parts.items()}
        samples.append(
            Sample(
                rollout.prompt_ids,
                rollout.completion_ids,
                advantages=torch.full(shape, float(advantages[place])),
                loss_mask=torch.full(shape, keep),
                group=prompt.index,
                index=place % n,
                origin=Origin(prompt.source, prompt.id),
                sampled=Sampled(rollout.logprobs, bool(cut[place])),
                scored=Scored(float(rewards[place]), parts, bool(result.failed[place])),
            )
        )
    for i, prompt in enumerate(prompts):
        view(run, prompt, samples[i * n : (i + 1) * n], texts[i * n : (i + 1) * n])
    return samples


def sampling(run: Run) -> Sampling:
    """How this step samples."""
    rollout = run.settings.rollout
    return Sampling(
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        stop_strings=tuple(rollout.stop),
        seed=run.settings.seed,
        step=run.state.step,
    )


def decode(run: Run, drawn: Sequence[Rollout]) -> list[str]:
    """The completions as text, without special tokens: what rewards read."""
    ids = [rollout.completion_ids.tolist() for rollout in drawn]
    return run.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []


def reward(
    run: Run,
    prompts: Sequence[Prompt],
    drawn: Sequence[Rollout],
    texts: Sequence[str],
    n: int,
    needed: bool = True,
) -> RewardResult:
    """The rewards of n completions a prompt; one that fails costs its sample alone.

    Raises ValueError where neither settings nor rows name a reward, unless it is not `needed`.
    """
    names = sorted({name for prompt in prompts for name in prompt.columns})
    if prompts and not run.settings.rewards.functions and "reward" not in names:
        if needed:
            raise ValueError(
                "rewards.functions: got none, and the rows have no reward column; expected one of "
                "the two, e.g. rewards.functions=[{path: exact_match}], or method.preset=opd"
            )
        failed = torch.ones(len(drawn), dtype=torch.bool)
        return RewardResult(torch.zeros(len(drawn)), {}, failed, [])
    columns = {name: [p.columns.get(name) for p in prompts for _ in range(n)] for name in names}
    columns["completion_tokens"] = [len(rollout.completion_ids) for rollout in drawn]
    columns["truncated"] = [rollout.finish_reason == "length" for rollout in drawn]
    seed = call_seed(run.settings.seed, run.state.step)
    with seeded(seed):  # for rewards in this process
        asked = [p.text for p in prompts for _ in range(n)]
        return run.scorer(asked, list(texts), columns, seed=seed)


def count_failed(run: Run, result: RewardResult) -> None:
    """Counts the batches in a row in which every sample's reward failed. COLLECTIVE."""
    own = [len(result.failed), int(result.failed.sum()), len(result.errors)]
    samples, failed, errors = ranks().totals(own)
    if samples:  # without an error there was no reward to fail
        run.failed_in_row = run.failed_in_row + 1 if errors and failed == samples else 0


def view(run: Run, prompt: Prompt, group: Sequence[Sample], texts: Sequence[str]) -> None:
    """The teacher's prompt and the factor on its term for each sample of a group."""
    if run.context is None and run.gate is None:
        return
    attempts = [
        Attempt(
            prompt=prompt.text,
            completion=text,
            row=prompt.columns,
            tokens=len(sample.completion_ids),
            reward=sample.scored.reward,
            correct=sample.scored.reward > run.settings.rewards.correct_above,
            failed=sample.scored.failed,
            truncated=sample.sampled.truncated,
        )
        for sample, text in zip(group, texts, strict=True)
    ]
    factors = [1.0] * len(group) if run.gate is None else run.gate(attempts)
    for row, (sample, factor) in enumerate(zip(group, factors, strict=True)):
        if run.context is not None:
            text, weight = run.context(attempts, row)
            factor = factor * weight
            if text is not None and factor:
                seen = run.stream.encoder.encode({"prompt": text}, Source(prompt="prompt"))
                sample.teacher_prompt_ids = seen.ids
        sample.teacher_factor = float(factor)
        if not factor:
            sample.teacher_mask = torch.zeros_like(sample.completion_ids, dtype=torch.bool)


def score(run: Run, samples: list[Sample]) -> None:
    """Old and reference log-probabilities, and weights for the sampler's mismatch. COLLECTIVE."""
    method = run.settings.method
    weighs = method.importance != "none" and not run.weighs_inside
    masks = method.importance == "mask"
    importance_weights = masked_importance_weights if masks else truncated_importance_weights
    ours = references = [None] * len(samples)
    if run.scores_old or weighs:
        ours = logprobs(run, run.model, samples)
    if run.reference is not None:
        references = logprobs(run, run.reference, samples)
    for sample, own, reference in zip(samples, ours, references, strict=True):
        sample.ref_logprobs = reference
        sample.old_logprobs = own if run.scores_old else None
        if sample.sampled is None:  # a given text
            continue
        sampler = sample.sampled.logprobs
        if method.old_logprobs == "sampler":
            sample.old_logprobs = sampler
        if weighs:
            whole = method.importance_level == "sequence"
            ids = torch.zeros(own.shape, dtype=torch.int64) if whole else None
            sample.policy_weights = importance_weights(
                own, sampler, method.importance_cap, sequence_ids=ids
            )
        if run.weighs_inside:
            sample.sampler_logprobs = sampler


@torch.no_grad()
def logprobs(run: Run, model: PolicyModel, samples: Sequence[Sample]) -> list[Tensor]:
    """(C,) log-probabilities of each completion under a model. COLLECTIVE."""
    bare = [
        Sample(s.prompt_ids, s.completion_ids, loss_mask=s.loss_mask, group=s.group)
        for s in samples
    ]
    found: dict[int, Tensor] = {}
    with model.evaluating():  # dropout would make these another policy's
        for micro in balanced_count(run.pack(bare)):
            micro = micro.to(run.device)
            inputs = micro.head_inputs("logprobs", options=run.options)
            found |= dict(micro.per_sample(model(micro, inputs=inputs).logprobs))
    return [found[i] for i in range(len(samples))]


def split(run: Run, samples: list[Sample], prompts: int, first: int) -> list[Batch]:
    """The samples of each of the batch's optimiser steps; those that no rank has samples for go.

    Split by the place of a sample's prompt among the `prompts` of the global batch, from `first`
    on, so that the split does not depend on the number of ranks.
    """
    updates = run.settings.batch.updates
    batches = [Batch([]) for _ in range(updates)]
    for sample in samples:
        batches[(sample.group - first) * updates // prompts].samples.append(sample)
    counts = ranks().totals([len(batch.samples) for batch in batches])
    return [batch for batch, count in zip(batches, counts, strict=True) if count]


@contextmanager
def timed(seconds: dict[str, float], verb: str) -> Iterator[None]:
    """Adds the time of the block to `seconds[verb]`, and names it in a profile."""
    start = time.perf_counter()
    with record_function(f"step/{verb}"):
        yield
    seconds[verb] = seconds.get(verb, 0.0) + time.perf_counter() - start
