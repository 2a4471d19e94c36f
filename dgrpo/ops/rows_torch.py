"""The row kernels in plain torch: the backend of CPUs, and of GPUs without Triton.

Same functions, arguments and results as `dgrpo_kernels` (whose docstrings hold the formulas), but
for the fused objective, which the plain `dgrpo.objectives.dgrpo` replaces; fp64 too. Rows go in
tiles that stay in cache, so that temporaries are a few MiB whatever the size of the block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dgrpo_kernels.rows import Logits, RowStats

FUSES_DGRPO = False
TILE = 2**18  # elements of one temporary
FLOOR = -1e6  # nats below the peak at which a teacher's logit is held
LOWEST = -1e30  # stands for -inf where 0 * inf would arise


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, TILE // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _linear(logits: Logits, tile: slice) -> Tensor:
    """Raw logits with their bias; a fresh tensor only when there is a bias."""
    raw = logits.raw[tile]
    return raw if logits.bias is None else raw + logits.bias[: raw.shape[1]]


def _shifted(x: Tensor, logits: Logits, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of raw values minus their row's maximum (or `shift`), (R, V) fresh; and that (R,)."""
    if logits.softcap is not None:
        z = torch.tanh_(x * (logits.scale / logits.softcap)).mul_(logits.softcap)
        z.masked_fill_(x == -torch.inf, -torch.inf)
    elif logits.scale != 1:
        z = x * logits.scale
    else:
        z = x
    if logits.temperature != 1:
        z = z / logits.temperature
    if shift is None:
        shift = z.amax(-1)
        shift.masked_fill_(shift == -torch.inf, 0)  # a row without columns
    return (z - shift[:, None] if z is x else z.sub_(shift[:, None])), shift


def _chain(x: Tensor, logits: Logits) -> Tensor:
    """d logit / d raw of capped logits."""
    bent = torch.tanh_(x * (logits.scale / logits.softcap))
    bent = bent.square_().neg_().add_(1).mul_(logits.scale / logits.temperature)
    return bent.masked_fill_(x == -torch.inf, 0)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def _hold(values: Tensor, logits: Logits, least: float) -> Tensor:
    """`values` of at least `least`, in place. Only a bias makes a logit of -inf, so only then."""
    return values if logits.bias is None else values.clamp_(min=least)


def row_stats(
    z: Logits,
    t: Logits | None,
    targets: Tensor,
    stats: Tensor,
    *,
    divergence: str = "reverse_kl",
    round_policy: bool = False,
    missing: float = float("nan"),
) -> None:
    """See `dgrpo_kernels.row_stats`."""
    rows, columns = z.raw.shape
    here = (targets >= 0) & (targets < columns)
    index = targets.where(here, 0)[:, None]
    for tile in _tiles(rows, columns):
        out = RowStats(*stats[:, tile].unbind(0))
        x = _linear(z, tile)
        u, top = _shifted(x, z)
        target = u.gather(1, index[tile])[:, 0]
        e = u.exp()
        total = e.sum(-1)
        log_sum = total.log()
        u.clamp_(min=LOWEST)  # a column taken out: 0 * inf
        out.max_z.copy_(top)
        out.log_sum_z.copy_(log_sum)
        out.entropy.copy_((log_sum - torch.linalg.vecdot(e, u) / total).where(total > 0, 0))
        if t is not None:
            v, top_t = _shifted(_linear(t, tile), t)
            f = v.exp()
            total_t = f.sum(-1)
            log_sum_t = total_t.log()
            own = v.gather(1, index[tile])[:, 0] - log_sum_t
            out.max_t.copy_(top_t)
            out.log_sum_t.copy_(log_sum_t)
            out.teacher_logprobs.copy_(own.where(here[tile], missing))
            _hold(v, t, FLOOR)
            if divergence == "reverse_kl":
                cross = torch.linalg.vecdot(e, torch.sub(u, v, out=v)) / total
                out.divergence.copy_(cross - log_sum + log_sum_t)
            elif divergence == "forward_kl":
                cross = torch.linalg.vecdot(f, torch.sub(v, u, out=v)) / total_t
                out.divergence.copy_(cross + log_sum - log_sum_t)
        if round_policy:
            u, top = _shifted(_rounded(x), z)
            target = u.gather(1, index[tile])[:, 0]
            log_sum = u.exp_().sum(-1).log()
        out.policy_max.copy_(top)
        out.policy_log_sum.copy_(log_sum)
        out.logprobs.copy_((target - log_sum).where(here[tile], missing))


def _log_probs(z: Logits, x: Tensor, top: Tensor, log_sum: Tensor) -> Tensor:
    return _shifted(x, z, top)[0].sub_(log_sum[:, None])


def _teacher_log_probs(t: Logits, tile: slice, at: RowStats) -> Tensor:
    v, _ = _shifted(_linear(t, tile), t, at.max_t)
    return _hold(v, t, FLOOR).sub_(at.log_sum_t[:, None])


def row_divergence(
    z: Logits,
    t: Logits,
    stats: Tensor,
    *,
    divergence: str,
    divergence_clip: float | None = None,
    jsd_beta: float = 0.5,
) -> None:
    """See `dgrpo_kernels.row_divergence`."""
    for tile in _tiles(*z.raw.shape):
        at = RowStats(*stats[:, tile].unbind(0))
        lp = _log_probs(z, _linear(z, tile), at.max_z, at.log_sum_z)
        lq = _teacher_log_probs(t, tile, at)
        q = lq.exp()
        if divergence == "clipped_forward_kl":
            term = torch.sub(lq, lp, out=lp).mul_(q).masked_fill_(q == 0, 0)
            at.aux.copy_(q.masked_fill_(term >= divergence_clip, 0).sum(-1))
            at.divergence.copy_(term.clamp_(max=divergence_clip).sum(-1))
        else:
            p = lp.exp()
            lp = _hold(lp, z, FLOOR)
            log_mix = _log_mix(lp, lq, jsd_beta)
            student = torch.linalg.vecdot(p, lp.sub_(log_mix))
            teacher = torch.linalg.vecdot(q, lq.sub_(log_mix))
            at.aux.copy_(student)
            at.divergence.copy_(jsd_beta * teacher + (1 - jsd_beta) * student)


def _log_mix(lp: Tensor, lq: Tensor, jsd_beta: float) -> Tensor:
    """log((1 - beta) p + beta q)."""
    return torch.logaddexp(lp + math.log1p(-jsd_beta), lq + math.log(jsd_beta))


def row_grad(
    z: Logits,
    t: Logits | None,
    targets: Tensor,
    stats: Tensor,
    coef: Tensor,
    out: Tensor,
    *,
    divergence: str = "reverse_kl",
    divergence_clip: float | None = None,
    jsd_beta: float = 0.5,
    round_policy: bool = False,
    grad_scale: Tensor | None = None,
) -> None:
    """See `dgrpo_kernels.row_grad`.

    All terms are `p (row constant + row factor * log p + ...)`: one product with p a row.
    """
    rows, columns = z.raw.shape
    if grad_scale is not None:
        coef = coef * grad_scale
    if z.softcap is None:
        coef = coef * (z.scale / z.temperature)
    here = (targets >= 0) & (targets < columns)
    index = targets.where(here, 0)[:, None]
    plain = round_policy is False
    for tile in _tiles(rows, columns):
        at = RowStats(*stats[:, tile].unbind(0))
        a, b, c = coef[:, tile, None].unbind(0)
        x = _linear(z, tile)
        lp = _log_probs(z, x, at.max_z, at.log_sum_z)
        p = lp.exp()
        lp.clamp_(min=LOWEST)
        lq = None if t is None else _teacher_log_probs(t, tile, at)
        fixed = -(c * at.entropy[:, None]).masked_fill_(c == 0, 0)
        if plain:
            fixed = fixed - a
        g = _divergence_grad(lp, lq, p, at, b, c, fixed, divergence, divergence_clip, jsd_beta)
        policy = g
        if not plain:
            x_b = _rounded(x)
            policy = _log_probs(z, x_b, at.policy_max, at.policy_log_sum).exp_().mul_(-a)
        policy.scatter_add_(1, index[tile], a.where(here[tile, None], 0))
        if z.softcap is not None:
            g.mul_(_chain(x, z))
            if not plain:
                policy.mul_(_chain(x_b, z))
        out[tile].copy_(g if plain else g.add_(policy))


def _divergence_grad(
    lp: Tensor,
    lq: Tensor | None,
    p: Tensor,
    at: RowStats,
    b: Tensor,
    c: Tensor,
    fixed: Tensor,
    divergence: str,
    clip: float | None,
    jsd_beta: float,
) -> Tensor:
    """`p (fixed - c log p) + b dD/dz`, (R, V), made of `lp`. b, c, fixed: (R, 1)."""
    skip = b == 0

    def times(value: Tensor) -> Tensor:
        return (b * value[:, None]).masked_fill(skip, 0)

    if lq is not None:
        lq.masked_fill_(skip, 0)  # whatever a teacher says of a token that skips it
    if divergence == "reverse_kl":
        inner = lp.mul_(b - c).addcmul_(lq, -b)
        return inner.add_(fixed - times(at.divergence)).mul_(p)
    if divergence == "jsd":
        factor = b * (1 - jsd_beta)
        mix = _log_mix(lp, lq, jsd_beta)
        inner = lp.mul_(factor - c).addcmul_(mix, -factor)
        return inner.add_(fixed - (1 - jsd_beta) * times(at.aux)).mul_(p)
    if divergence == "none":
        return lp.mul_(-c).add_(fixed).mul_(p)
    if divergence == "bucket":
        return lp.mul_(-c).add_(fixed + times(at.aux)).mul_(p)
    q = lq.exp()
    if divergence == "forward_kl":
        return lp.mul_(-c).add_(fixed + b).mul_(p).addcmul_(q, -b)
    unclipped = torch.sub(lq, lp, out=lq).mul_(q) < clip
    return lp.mul_(-c).add_(fixed + times(at.aux)).mul_(p).addcmul_(q.mul_(unclipped), -b)


def topk_take(raw: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """See `dgrpo_kernels.topk_take`."""
    here = (ids >= 0) & (ids < raw.shape[1])
    index = ids.where(here, 0)
    taken = raw.gather(1, index)
    if bias is not None:
        taken = taken + bias[index]
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    raw[rows[here], ids[here]] = -torch.inf
    return taken.masked_fill_(~here, -torch.inf)


def topk_put(grad: Tensor, ids: Tensor, values: Tensor) -> None:
    """See `dgrpo_kernels.topk_put`."""
    here = (ids >= 0) & (ids < grad.shape[1])
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    grad[rows[here], ids[here]] = values[here].to(grad.dtype)
