"""The row kernels in plain torch: the backend of CPUs, and of GPUs without Triton.

Same functions, arguments and results as `dgrpo_kernels` (whose docstrings hold the formulas), but
for the fused objective, which the plain `dgrpo.objectives.dgrpo` replaces; fp64 too. Rows go in
tiles that stay in cache, so that temporaries are a few MiB for blocks of any size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dgrpo.ops.divergences import LOWEST, SLOPES, Parameter, Side, Terms
from dgrpo_kernels.rows import FLOOR, Logits, RowStats

FUSES_DGRPO = False
TILE = 2**18  # elements of one temporary on a CPU: they stay in its cache
CUDA_TILE = 2**26  # there every operation on a tile is a kernel: few and large ones
TEMPORARIES = 9  # of a tile's size at a time (8.2 measured: JSD, bias, soft cap, rounded policy)


def _tiles(raw: Tensor) -> Iterator[slice]:
    rows, columns = raw.shape
    step = max(1, (CUDA_TILE if raw.is_cuda else TILE) // max(columns, 1))
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
    """`values` of at least `least`, in place, where some may be -inf."""
    return values.clamp_(min=least) if logits.holes else values


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
    entry = SLOPES[divergence]
    here = (targets >= 0) & (targets < columns)
    index = targets.where(here, 0)[:, None]
    for tile in _tiles(z.raw):
        out = RowStats(*stats[:, tile].unbind(0))
        x = _linear(z, tile)
        u, top = _shifted(x, z)
        target = u.gather(1, index[tile])[:, 0]
        e = u.exp()
        total = e.sum(-1)
        log_sum = total.log()
        out.max_z.copy_(top)
        out.log_sum_z.copy_(log_sum)
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
            if entry.passes == 1:
                sides = Side(u, e, total, log_sum), Side(v, f, total_t, log_sum_t)
                out.divergence.copy_(entry.online(*sides, z.holes))
        _hold(u, z, LOWEST)
        out.entropy.copy_((log_sum - u.mul_(e).sum(-1) / total).where(total > 0, 0))
        if round_policy:
            u, top = _shifted(_rounded(x), z)
            target = u.gather(1, index[tile])[:, 0]
            log_sum = u.exp_().sum(-1).log()
        out.policy_max.copy_(top)
        out.policy_log_sum.copy_(log_sum)
        out.logprobs.copy_((target - log_sum).where(here[tile], missing))


def row_divergence(
    z: Logits,
    t: Logits,
    stats: Tensor,
    *,
    divergence: str,
    parameter: float | Tensor | None = None,
) -> None:
    """See `dgrpo_kernels.row_divergence`."""
    for tile in _tiles(z.raw):
        at = RowStats(*stats[:, tile].unbind(0))
        lp = _shifted(_linear(z, tile), z, at.max_z)[0].sub_(at.log_sum_z[:, None])
        lq = _hold(_shifted(_linear(t, tile), t, at.max_t)[0], t, FLOOR)
        lq = lq.sub_(at.log_sum_t[:, None])
        value, aux = SLOPES[divergence].columns(lp, lq, _of(parameter, tile), z.holes)
        at.divergence.copy_(value)
        at.aux.copy_(aux)


def _of(parameter: float | Tensor | None, tile: slice) -> Parameter:
    """A divergence's parameter in the rows of a tile, a number or (R, 1)."""
    return parameter[tile, None] if isinstance(parameter, Tensor) else parameter


def row_grad(
    z: Logits,
    t: Logits | None,
    targets: Tensor,
    stats: Tensor,
    coef: Tensor,
    out: Tensor,
    *,
    policy: None = None,
    divergence: str = "reverse_kl",
    parameter: float | Tensor | None = None,
    round_policy: bool = False,
) -> None:
    """See `dgrpo_kernels.row_grad`.

    All terms are `e^u (row constant + row factor u + ...)`: neither the normaliser nor a term costs
    a pass over the tile.
    """
    rows, columns = z.raw.shape
    entry = SLOPES[divergence]
    if z.softcap is None:
        coef = coef * (z.scale / z.temperature)
    no_entropy = not coef.is_cuda and not coef[2].any()  # on a GPU asking would wait for it
    here = (targets >= 0) & (targets < columns)
    index = targets.where(here, 0)[:, None]
    for tile in _tiles(z.raw):
        at = RowStats(*stats[:, tile].unbind(0))
        a, b, c = coef[:, tile, None].unbind(0)
        x = _linear(z, tile)
        u, _ = _shifted(x, z, at.max_z)
        e = u.exp()
        _hold(u, z, LOWEST)
        v = None if t is None else _hold(_shifted(_linear(t, tile), t, at.max_t)[0], t, FLOOR)
        if divergence == "bucket":
            v, _ = _shifted(x, z, at.max_t)
        if divergence == "none" and no_entropy:
            g = e.mul_(-a * (-at.log_sum_z[:, None]).exp()) if not round_policy else e.zero_()
        else:
            fixed = -(c * at.entropy[:, None]).masked_fill_(c == 0, 0)
            fixed = fixed if round_policy else fixed - a
            log_sum = at.log_sum_z[:, None]
            inverse = (-log_sum).exp()
            terms = Terms(at, b, c, fixed, log_sum, inverse, _of(parameter, tile))
            if v is not None:
                v.masked_fill_(b == 0, 0)  # a skipped token's teacher may hold NaN or inf
            g = entry.slope(terms, u, v, e)
            if z.holes and entry.adds_q:
                g.masked_fill_(x == -torch.inf, 0)
        policy = g
        if round_policy:
            x_b = _rounded(x)
            policy = _shifted(x_b, z, at.policy_max)[0].exp_()
            policy.mul_(-a * (-at.policy_log_sum[:, None]).exp())
        seen = here[tile, None]
        if z.holes:
            seen = seen & (x.gather(1, index[tile]) != -torch.inf)
        policy.scatter_add_(1, index[tile], a.where(seen, 0))
        if z.softcap is not None:
            g.mul_(_chain(x, z))
            if round_policy:
                policy.mul_(_chain(x_b, z))
        out[tile].copy_(g.add_(policy) if round_policy else g)


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
