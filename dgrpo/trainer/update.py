"""The other verbs of a step: teacher, token weights, backward passes, the optimiser's step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch.profiler import record_function

from dgrpo.distributed import ranks
from dgrpo.objectives import BatchCounts, token_weights
from dgrpo.trainer.batch import IGNORED, Micro, balanced_count
from dgrpo.trainer.collect import timed
from dgrpo.trainer.config import Schedule
from dgrpo.trainer.optim import lr_factor, set_lr
from dgrpo.trainer.policy import fsdp
from dgrpo.trainer.run import Batch, Run


def attach_teacher(run: Run, batch: Batch) -> None:
    """The teacher reads the batch once; its last hidden states stay for the loss. COLLECTIVE."""
    if run.teacher is None:
        return
    packing = run.settings.batch
    with timed(batch.seconds, "teacher"):
        run.teacher.attach(batch.samples, packing.tokens, packing.share_prompts)


def weigh(run: Run, batch: Batch) -> None:
    """Token weights over all ranks and micro-batches, and the teacher's weight. COLLECTIVE."""
    samples, kind = batch.samples, run.settings.method.normalizer
    masks = [sample.mask for sample in samples]
    local = kind == "local"  # the one normaliser that depends on the packing
    packed = [m.indices for m in run.pack(samples)] if local else []
    own = [int(mask.sum()) for mask in masks]
    totals = ranks().totals([sum(own), sum(n > 0 for n in own), len(packed)])
    counts = BatchCounts(*map(int, totals))
    batch.with_loss = int(counts.tokens)
    for members in packed or [(i,) for i in range(len(samples))]:
        mask = torch.cat([masks[i] for i in members])
        lengths = [len(masks[i]) for i in members]
        weights = token_weights(
            mask,
            kind,
            sequence_ids=torch.arange(len(members)).repeat_interleave(torch.tensor(lengths)),
            counts=counts,
            max_length=run.settings.rollout.max_tokens,
            world_size=ranks().world,
        )
        for i, own_weights in zip(members, weights.split(lengths), strict=True):
            samples[i].token_weights = own_weights
    teacher_coef = coefficients(run)["teacher_coef"]
    for sample in samples:
        if sample.teacher_factor != 1.0:
            shape = sample.completion_ids.shape
            sample.teacher_coef = torch.full(shape, teacher_coef * sample.teacher_factor)


def coefficients(run: Run, step: int | None = None) -> dict[str, float]:
    """The scheduled coefficients of the 0-based step, by default the one under way."""
    method = run.settings.method
    step = run.state.step if step is None else step
    values = {name: getattr(method, name) for name in ("teacher_coef", "ref_coef", "entropy_coef")}
    return {
        name: value.at(step, run.settings.steps) if isinstance(value, Schedule) else value
        for name, value in values.items()
    }


def micro_batches(run: Run, batch: Batch) -> Iterator[Micro]:
    """The packed micro-batches of the step, as many on every rank. COLLECTIVE."""
    method = run.settings.method
    constants = {
        "clip_low": method.clip_low,
        "clip_high": method.clip_high,
        "clip_dual": method.clip_dual,
        "is_cap": method.importance_cap if run.weighs_inside else None,
        **coefficients(run),
    }
    if run.teacher is None:
        constants["teacher_coef"] = 0.0
    micros = balanced_count(run.pack(batch.samples, **constants), **constants)
    batch.tokens = sum(sum(micro.lengths) for micro in micros if micro.samples)
    for place, micro in enumerate(micros):
        last = place == len(micros) - 1
        fsdp.sync_gradients(run.model, last, every_micro=run.settings.fsdp.reduce_every_micro)
        yield micro.to(run.device)


def backward(run: Run, batch: Batch, micro: Micro) -> None:
    """Forward and backward of one micro-batch; what it gave stays on the device. COLLECTIVE."""
    mode, functions = "loss", {"objective": run.objective}
    if run.per_sequence:
        ids = torch.where(micro.targets == IGNORED, -1, micro.sequence_ids)
        function = partial(run.objective, sequence_ids=ids)
        mode, functions = "stats", {"sequence_objective": function}
    with timed(batch.seconds, "train"):
        inputs = micro.head_inputs(
            mode,
            teacher=None if run.teacher is None else run.teacher.head(micro),
            options=run.options,
            **functions,
        )
        with record_function("step/forward"):
            out = run.model(micro, inputs=inputs)
        with record_function("step/backward"):
            out.loss.backward()
    batch.outputs.append((micro, out._replace(loss=out.loss.detach())))


def update(run: Run, batch: Batch) -> None:
    """One optimiser step, or none where the loss or the gradient is not finite. COLLECTIVE.

    All ranks decide alike: the norm is global, and the loss is summed over them.
    """
    settings, state = run.settings.optimizer, run.state
    with timed(batch.seconds, "train"):  # on a GPU: waits for the backward passes
        own = torch.stack([out.loss for _, out in batch.outputs]).double().sum()
        loss = float(own) / ranks().world  # its weights count the ranks
    with timed(batch.seconds, "update"):
        limit = settings.clip_norm
        norm = fsdp.grad_norm(run.model) if limit is None else fsdp.clip_gradients(run.model, limit)
        totals = ranks().totals([loss, float(norm), float(run.interrupted)])
        finite = math.isfinite(totals[0]) and math.isfinite(totals[1])
        rate = set_lr(run.optimizers, settings, lr_factor(settings, state.step, run.settings.steps))
        for optimizer in run.optimizers:
            if finite and batch.with_loss:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    run.stopping = run.stopping or totals[2] > 0
    state.step += 1
    state.skipped += not finite
    state.skipped_in_row = 0 if finite else state.skipped_in_row + 1
    if not finite:
        run.log.message(f"step {state.step} skipped: loss {totals[0]}, gradient norm {float(norm)}")
    batch.loss, batch.norm, batch.lr = totals[0], float(norm), rate


def parameters_finite(run: Run) -> bool:
    """Whether all trained parameters are finite, on all ranks. COLLECTIVE."""
    trained = [fsdp.local(p.detach()) for p in run.model.parameters() if p.requires_grad]
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in trained]).all()  # one sync
    return ranks().totals([not finite])[0] == 0
