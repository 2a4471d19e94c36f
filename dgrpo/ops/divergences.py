"""Every divergence D between student p and teacher q in plain torch: check, value and slope.

The twin of `dgrpo_kernels.divergences`, whose docstring holds the formulas, on tiles of columns
(for `rows_torch`) and on the buckets of a top-k teacher (for `topk`). To add one: a class here.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dgrpo.ops.checks import check_like_targets, check_number
from dgrpo_kernels.rows import FLOOR, RowStats

LOWEST = -1e30  # stands for -inf where 0 * inf would arise
Parameter = float | Tensor | None  # a number, or one per row: (R, 1)


class Tile(NamedTuple):
    """Columns of some rows: u, v, e^u, e^v (R, V), their sums and the logs of these, (R,)."""

    u: Tensor
    e: Tensor
    total: Tensor
    log_sum: Tensor
    v: Tensor
    f: Tensor
    total_t: Tensor
    log_sum_t: Tensor
    holes: bool  # u may be -inf


class Terms(NamedTuple):
    """Per-row scalars of a tile's gradient, (R, 1), and how it is put together."""

    at: RowStats
    b: Tensor
    c: Tensor
    fixed: Tensor  # what multiplies p alone
    log_sum: Tensor  # log p = u - log_sum
    inverse: Tensor  # p = e inverse
    parameter: Parameter

    @property
    def plain(self) -> Tensor:
        """`fixed`, with the entropy term's share of log p = u - log_sum."""
        return self.fixed + self.c * self.log_sum

    def log_q(self, v: Tensor) -> Tensor:
        """log q, in place of v; finite where b = 0."""
        return v.sub_(self.at.log_sum_t[:, None].masked_fill(self.b == 0, 0))

    def times_b(self, value: Tensor) -> Tensor:
        """`b value` for (R,) values, 0 where b = 0."""
        return (self.b * value[:, None]).masked_fill(self.b == 0, 0)

    def gradient(self, u: Tensor, e: Tensor, plain: Tensor) -> Tensor:
        """`p (plain - c u)`, in place of u."""
        return u.mul_(-self.c * self.inverse).add_(plain * self.inverse).mul_(e)


class Buckets(NamedTuple):
    """A divergence over a top-k teacher's buckets: `dD/dz` of a column is `p aux - q`."""

    value: Tensor  # (R,)
    slope: Tensor  # (R, K) of the K columns
    aux: Tensor  # (R,) of the tail
    log_q: Tensor  # (R,) of the tail


class Divergence:
    """A divergence; this one is that of calls without a teacher, 0 everywhere."""

    passes: ClassVar[int] = 0  # over the row until its value is known
    parameter: ClassVar[str | None] = None  # the option that it takes
    steep: ClassVar[bool] = False  # |dD/dz| grows with D; otherwise it is at most 1
    adds_q: ClassVar[bool] = False  # dD/dz is not 0 where p is

    def check(self, value: Any, targets: Tensor, chosen: bool) -> None:
        """Raise for a value of its option that cannot be used; `chosen`: it is the call's own."""

    def check_values(self, values: Tensor) -> None:
        """Raise for values of its option, one per token, that cannot be used. Syncs."""

    def online(self, tile: Tile) -> Tensor:
        """(R,) value, for one pass. May change u, v and f."""
        raise NotImplementedError

    def columns(self, lp: Tensor, lq: Tensor, parameter: Parameter, holes: bool) -> tuple:
        """(R,) value and aux over the columns at hand, for two passes. May change lp and lq."""
        raise NotImplementedError

    def slope(self, terms: Terms, u: Tensor, v: Tensor | None, e: Tensor) -> Tensor:
        """`p (fixed - c log p) + b dD/dz`, (R, V). Changes u, v and e."""
        return terms.gradient(u, e, terms.plain)

    def buckets(self, lp: Tensor, lq: Tensor, parameter: Parameter) -> Buckets:
        """Over (R, K + 1) log-masses, the tail first.

        Both are -inf where a bucket has no columns, lp alone where the student forbids them.
        """
        raise NotImplementedError


class Bucket(Divergence):
    """The slope of any divergence in the tail of a top-k teacher: `p aux - q`."""

    def slope(self, terms: Terms, u: Tensor, v: Tensor, e: Tensor) -> Tensor:
        q = terms.log_q(v).exp_()
        plain = terms.plain + terms.times_b(terms.at.aux)
        return terms.gradient(u, e, plain).addcmul_(q, -terms.b)


class ReverseKL(Divergence):
    """KL(p‖q)."""

    passes, steep = 1, True

    def online(self, tile: Tile) -> Tensor:
        u = tile.u.clamp_(min=LOWEST) if tile.holes else tile.u
        cross = torch.sub(u, tile.v, out=tile.v).mul_(tile.e).sum(-1) / tile.total
        return cross - tile.log_sum + tile.log_sum_t

    def slope(self, terms: Terms, u: Tensor, v: Tensor, e: Tensor) -> Tensor:
        at, b, c, inverse = terms.at, terms.b, terms.c, terms.inverse
        fixed = terms.fixed - terms.times_b(at.divergence - at.log_sum_t) - (b - c) * terms.log_sum
        u.mul_((b - c) * inverse).addcmul_(v, -b * inverse)
        return u.add_(fixed * inverse).mul_(e)

    def buckets(self, lp: Tensor, lq: Tensor, parameter: Parameter) -> Buckets:
        p, lp, lq, nothing = lp.exp(), known(lp), lq.clamp(min=FLOOR), absent(lq)
        r = lp - lq
        value = (p * r).sum(1)
        return Buckets(value, p[:, 1:] * (r[:, 1:] - value[:, None]), r[:, 0] - value, nothing)


class ForwardKL(Divergence):
    """KL(q‖p), infinite where the student forbids what the teacher says."""

    passes, adds_q = 1, True

    def online(self, tile: Tile) -> Tensor:
        cross = tile.v.sub_(tile.u).mul_(tile.f)
        cross = cross.masked_fill_(tile.f == 0, 0) if tile.holes else cross
        return cross.sum(-1) / tile.total_t + tile.log_sum - tile.log_sum_t

    def slope(self, terms: Terms, u: Tensor, v: Tensor, e: Tensor) -> Tensor:
        q = terms.log_q(v).exp_()
        return terms.gradient(u, e, terms.plain + terms.b).addcmul_(q, -terms.b)

    def buckets(self, lp: Tensor, lq: Tensor, parameter: Parameter) -> Buckets:
        p, q, tail = lp.exp(), lq.exp(), lq[:, 0]
        term = (q * (lq.clamp(min=FLOOR) - lp)).masked_fill(q == 0, 0)
        kept = torch.ones_like(q, dtype=torch.bool)
        if parameter is not None:
            kept, term = term < parameter, term.clamp(max=parameter)
        q = q.where(kept, 0)
        mass = q.sum(1)
        slope = p[:, 1:] * mass[:, None] - q[:, 1:]
        return Buckets(term.sum(1), slope, mass, tail.where(kept[:, 0], absent(lq)))


class ClippedForwardKL(ForwardKL):
    """`sum min(q log(q/p), C)`; aux = the mass of the unclipped q."""

    passes, parameter, adds_q = 2, "divergence_clip", False

    def check(self, value: Any, targets: Tensor, chosen: bool) -> None:
        if chosen and value is None:
            raise ValueError(
                "divergence_clip: got None, expected a positive number (nats per column) with "
                "divergence='clipped_forward_kl'"
            )
        if chosen:
            check_number("divergence_clip", value, above=0)
        elif value is not None:
            raise ValueError(
                f"divergence_clip: got {value}, expected None; it belongs to "
                "divergence='clipped_forward_kl'"
            )

    def columns(self, lp: Tensor, lq: Tensor, parameter: Parameter, holes: bool) -> tuple:
        q = lq.exp()
        term = torch.sub(lq, lp, out=lp).mul_(q).masked_fill_(q == 0, 0)
        aux = q.masked_fill_(term >= parameter, 0).sum(-1)
        return term.clamp_(max=parameter).sum(-1), aux

    def slope(self, terms: Terms, u: Tensor, v: Tensor, e: Tensor) -> Tensor:
        lq, lp = terms.log_q(v), u - terms.log_sum
        q = lq.exp()
        q.mul_(torch.sub(lq, lp, out=lq).mul_(q) < terms.parameter)
        plain = terms.plain + terms.times_b(terms.at.aux)
        return terms.gradient(u, e, plain).addcmul_(q, -terms.b)


class JSD(Divergence):
    """`beta KL(q‖M) + (1 - beta) KL(p‖M)`, `M = (1 - beta) p + beta q`; aux = KL(p‖M)."""

    passes, parameter = 2, "jsd_beta"

    def check(self, value: Any, targets: Tensor, chosen: bool) -> None:
        check_number("jsd_beta", value)
        if chosen and not 0 < value < 1:
            other = "forward_kl" if value <= 0 else "reverse_kl"
            raise ValueError(
                f"jsd_beta: got {value}, expected 0 < jsd_beta < 1; at the end of that range use "
                f"divergence={other!r}"
            )

    def columns(self, lp: Tensor, lq: Tensor, parameter: Parameter, holes: bool) -> tuple:
        p, q = lp.exp(), lq.exp()
        lp = lp.clamp_(min=FLOOR) if holes else lp
        log_mix = self._log_mix(lp, lq, parameter)
        student = torch.linalg.vecdot(p, lp.sub_(log_mix))
        teacher = torch.linalg.vecdot(q, lq.sub_(log_mix))
        return parameter * teacher + (1 - parameter) * student, student

    def slope(self, terms: Terms, u: Tensor, v: Tensor, e: Tensor) -> Tensor:
        lq, lp, beta = terms.log_q(v), u - terms.log_sum, terms.parameter
        plain = terms.plain - (1 - beta) * terms.times_b(terms.at.aux)
        share = terms.b * (1 - beta)
        lp.sub_(self._log_mix(lp, lq, beta)).mul_(share * terms.inverse)
        return lp.addcmul_(u, -terms.c * terms.inverse).add_(plain * terms.inverse).mul_(e)

    def buckets(self, lp: Tensor, lq: Tensor, parameter: Parameter) -> Buckets:
        p, q, lp, lq, nothing = lp.exp(), lq.exp(), known(lp), lq.clamp(min=FLOOR), absent(lq)
        parts = torch.tensor([1 - parameter, parameter], dtype=torch.float64).log().tolist()
        student = lp.masked_fill(p == 0, -torch.inf) + parts[0]
        teacher = lq.masked_fill(q == 0, -torch.inf) + parts[1]
        mix = torch.logaddexp(student, teacher).masked_fill((p == 0) & (q == 0), 0)
        r = lp - mix
        to_student = (p * r).sum(1)
        to_teacher = (q * (lq - mix)).sum(1)
        value = parameter * to_teacher + (1 - parameter) * to_student
        r = (1 - parameter) * (r - to_student[:, None])
        return Buckets(value, p[:, 1:] * r[:, 1:], r[:, 0], nothing)

    @staticmethod
    def _log_mix(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
        return torch.logaddexp(lp + math.log1p(-beta), lq + math.log(beta))


class Jeffreys(Divergence):
    """`w KL(q‖p) + (1 - w) KL(p‖q)`, w a number or one per token; aux = KL(p‖q)."""

    passes, parameter, steep, adds_q = 2, "jeffreys_weight", True, True

    def check(self, value: Any, targets: Tensor, chosen: bool) -> None:
        if isinstance(value, Tensor):
            check_like_targets("jeffreys_weight", value, targets)
        elif not 0 <= check_number("jeffreys_weight", value) <= 1:
            raise ValueError(f"jeffreys_weight: got {value}, expected 0 to 1")

    def check_values(self, values: Tensor) -> None:
        outside = ~((values >= 0) & (values <= 1))
        if bool(outside.any()):
            raise ValueError(f"jeffreys_weight: got {float(values[outside][0])}, expected 0 to 1")

    def columns(self, lp: Tensor, lq: Tensor, parameter: Parameter, holes: bool) -> tuple:
        q = lq.exp()
        teacher = (lq - lp).mul_(q).masked_fill_((q == 0) | (parameter == 0), 0).sum(-1)
        p = lp.exp()
        lp = lp.clamp_(min=FLOOR) if holes else lp
        student = torch.linalg.vecdot(p, lp.sub_(lq))
        return _mixed(parameter, teacher, student), student

    def slope(self, terms: Terms, u: Tensor, v: Tensor, e: Tensor) -> Tensor:
        lq, lp, weight = terms.log_q(v), u - terms.log_sum, terms.parameter
        share = terms.b * (1 - weight)
        plain = terms.plain + terms.b * weight - (1 - weight) * terms.times_b(terms.at.aux)
        lp.sub_(lq).mul_(share * terms.inverse).addcmul_(u, -terms.c * terms.inverse)
        g = lp.add_(plain * terms.inverse).mul_(e)
        return g.addcmul_(lq.exp_(), -terms.b * weight)

    def buckets(self, lp: Tensor, lq: Tensor, parameter: Parameter) -> Buckets:
        forward, reverse = ForwardKL().buckets(lp, lq, None), ReverseKL().buckets(lp, lq, None)
        weight = lq.new_full((len(lq), 1), 1) * parameter
        teacher = forward.value.masked_fill(weight[:, 0] == 0, 0)
        return Buckets(
            _mixed(weight, teacher, reverse.value),
            weight * forward.slope + (1 - weight) * reverse.slope,
            _mixed(weight, forward.aux, reverse.aux),
            forward.log_q + weight[:, 0].log(),
        )


def _mixed(weight: Parameter, teacher: Tensor, student: Tensor) -> Tensor:
    """(R,) `w teacher + (1 - w) student`."""
    weight = weight[:, 0] if isinstance(weight, Tensor) else weight
    return weight * teacher + (1 - weight) * student


DIVERGENCES = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "clipped_forward_kl": ClippedForwardKL(),
    "jsd": JSD(),
    "jeffreys": Jeffreys(),
}
PARAMETERS = tuple(d.parameter for d in DIVERGENCES.values() if d.parameter is not None)
SLOPES = {**DIVERGENCES, "none": Divergence(), "bucket": Bucket()}  # what the row kernels know


def known(lp: Tensor) -> Tensor:
    """Log-masses with 0 for -inf, where p = 0."""
    return lp.masked_fill(lp == -torch.inf, 0)


def absent(lq: Tensor) -> Tensor:
    """(R,) log q of a tail that has no q."""
    return torch.full_like(lq[:, 0], -torch.inf)


def check_divergence(options: Any, targets: Tensor) -> None:
    """Raise for an unknown divergence, and for parameters (by attribute) that cannot be used."""
    if options.divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence: got {options.divergence!r}, expected one of {', '.join(DIVERGENCES)}"
        )
    for name, divergence in DIVERGENCES.items():
        if divergence.parameter is not None:
            value = getattr(options, divergence.parameter)
            divergence.check(value, targets, chosen=name == options.divergence)


def check_parameter_values(options: Any, taught: Tensor) -> None:
    """Raise for a parameter's values that cannot be used at `taught` tokens (bool). Syncs."""
    divergence = DIVERGENCES[options.divergence]
    value = None if divergence.parameter is None else getattr(options, divergence.parameter)
    if isinstance(value, Tensor):
        divergence.check_values(value[taught])
