"""Statistics of a part of the rows, finished: top-k columns, shards and second passes included."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dgrpo.ops.call import Call
from dgrpo.ops.shards import add_divergence, merge_stats
from dgrpo.ops.teachers import TopKTeacher
from dgrpo.ops.topk import TopKRows, merge_topk, tail_logprob, topk_grad
from dgrpo_kernels.rows import Logits, RowStats

SECOND_PASS = ("clipped_forward_kl", "jsd")


def measure(
    call: Call, z: Logits, t: Logits | None, part: slice, stats: Tensor, again: bool = False
) -> TopKRows | None:
    """Write the statistics of the rows `part` into `stats`, an (11, R) view; (R, V) logits stay.

    Under a top-k teacher its columns are taken out of `z` and returned. `again`: the statistics are
    there from an earlier pass (recompute mode) and only a top-k teacher's columns are wanted.
    """
    topk = isinstance(call.teacher, TopKTeacher)
    if again and not topk:
        return None
    if again:  # measured anew for its columns; what stands there is final
        stats = stats.clone()
    targets, known = call.targets[part], call.targets_known[part]
    local = "none" if topk or call.divergence in SECOND_PASS else call.divergence
    if topk:
        target_raw = _take_targets(call, z, targets)
        ids, taken = _take_columns(call, z, part)
    call.backend.row_stats(
        z,
        t,
        targets,
        stats,
        divergence=local,
        round_policy=call.round_policy,
        missing=float("nan") if call.shard is None else -float("inf"),
    )
    if call.shard is not None:
        merge_stats(stats, call.shard, local, known, teacher=t is not None)
    if topk:
        return _merge_columns(call, z, part, stats, ids, taken, target_raw)
    if call.divergence in SECOND_PASS:
        call.backend.row_divergence(
            z,
            t,
            stats,
            divergence=call.divergence,
            divergence_clip=call.divergence_clip,
            jsd_beta=call.jsd_beta,
        )
        if call.shard is not None:
            add_divergence(stats, call.shard)
    if call.has_teacher is not None:
        out = RowStats(*stats.unbind(0))
        absent = ~call.has_teacher[part]
        out.divergence.masked_fill_(absent, 0)
        out.teacher_logprobs.masked_fill_(absent, 0)
    return None


def _take_targets(call: Call, z: Logits, targets: Tensor) -> Tensor:
    """Raw logits of the targets, before a top-k column is taken out."""
    index = targets.clamp(0, call.columns - 1)
    raw = z.raw.gather(1, index[:, None])[:, 0]
    raw = raw if z.bias is None else raw + z.bias[index]
    if call.shard is None:
        return raw
    raw = raw.masked_fill((targets < 0) | (targets >= call.columns), -torch.inf)
    return _over_shards(call, raw)


def _take_columns(call: Call, z: Logits, part: slice) -> tuple[Tensor, Tensor]:
    """The part's top-k ids, counted from this shard's start, and their raw logits."""
    ids = _flat(call.teacher.token_ids)[call.rows[part]]
    if call.shard is not None:
        ids = torch.where(ids < 0, ids, ids - call.shard.start)
    ids = torch.where((ids >= 0) & (ids < call.columns), ids, -1).contiguous()
    return ids, call.backend.topk_take(z.raw, z.bias, ids)


def _merge_columns(
    call: Call, z: Logits, part: slice, stats: Tensor, ids: Tensor, taken: Tensor, raw: Tensor
) -> TopKRows:
    if call.shard is not None:
        taken = _over_shards(call, taken)
    rows = call.rows[part]
    teacher = call.teacher
    global_ids = _flat(teacher.token_ids)[rows]
    logprobs = _flat(teacher.logprobs)[rows].to(taken.dtype)
    total = call.columns if call.shard is None else call.shard.total
    # A column outside the compared vocabulary counts towards the tail bucket.
    there = (global_ids >= 0) & (global_ids < total)
    logprobs = logprobs.masked_fill(~there, -torch.inf)
    columns = merge_topk(
        z,
        taken,
        ids,
        raw,
        call.targets_known[part],
        logprobs,
        there.sum(1) < total,
        stats,
        divergence=call.divergence,
        divergence_clip=call.divergence_clip,
        jsd_beta=call.jsd_beta,
        round_policy=call.round_policy,
    )
    out = RowStats(*stats.unbind(0))
    if teacher.target_logprobs is not None:
        own = teacher.target_logprobs.reshape(-1)[rows].to(taken.dtype)
    else:
        start = 0 if call.shard is None else call.shard.start
        here = global_ids == (call.targets[part] + start)[:, None]
        tail = tail_logprob(logprobs).to(taken.dtype)
        own = logprobs.masked_fill(~here, -torch.inf).amax(1) if ids.shape[1] else tail
        own = torch.where(here.any(1), own, tail)
    out.teacher_logprobs.copy_(own)
    absent = (global_ids < 0).all(1) & (global_ids.shape[1] > 0)
    out.teacher_logprobs.masked_fill_(absent, 0)
    out.divergence.masked_fill_(absent, 0)
    return columns


def _over_shards(call: Call, values: Tensor) -> Tensor:
    """What one shard holds and the others have as -inf."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=call.shard.group)
    return values


def _flat(values: Tensor) -> Tensor:
    return values.flatten(0, -2)


def put_columns(
    call: Call, columns: TopKRows, part: slice, entropy: Tensor, coef: Tensor, grad: Tensor
) -> None:
    """Write a top-k teacher's columns into the gradient block."""
    values = topk_grad(columns, call.targets[part], entropy, coef)
    call.backend.topk_put(grad, columns.ids, values)
