"""Every divergence D between student p and teacher q in plain torch: check, value and slope.

The twin of `dgrpo_kernels.divergences`, which holds the formulas, on tiles of columns (for
`rows_torch`) and on the buckets of a top-k teacher (for `topk`). To add one: a class here.
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


class Side(NamedTuple):
    """One model's columns of a tile: logits less the row's maximum u and e^u, (R, V)."""

    u: Tensor
    e: Tensor
    total: Tensor  # (R,) of e
    log_sum: Tensor  # (R,)


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
    """A divergence over K + 1 buckets: dD/dz of a column is `p aux - exp(log_q)` of its bucket."""

    value: Tensor  # (R,)
    aux: Tensor  # (R, K + 1)
    log_q: Tensor  # (R, K + 1)


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

    def of(self, options: Any) -> Parameter | None:
        """The value of its option: a number, or one per token."""
        return None if self.parameter is None else getattr(options, self.parameter)

    def online(self, z: Side, t: Side, holes: bool) -> Tensor:
        """(R,) value, for one pass; holes: z.u may be -inf. May change z.u, t.u and t.e."""
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

    def online(self, z: Side, t: Side, holes: bool) -> Tensor:
        u = z.u.clamp_(min=LOWEST) if holes else z.u
        cross = torch.sub(u, t.u, out=t.u).mul_(z.e).sum(-1) / z.total
        return cross - z.log_sum + t.log_sum

    def slope(self, terms: Terms, u: Tensor, v: Tensor, e: Tensor) -> Tensor:
        at, b, c, inverse = terms.at, terms.b, terms.c, terms.inverse
        fixed = terms.fixed - terms.times_b(at.divergence - at.log_sum_t) - (b - c) * terms.log_sum
        u.mul_((b - c) * inverse).addcmul_(v, -b * inverse)
        return u.add_(fixed * inverse).mul_(e)

    def buckets(self, lp: Tensor, lq: Tensor, parameter: Parameter) -> Buckets:
        r = _known(lp) - lq.clamp(min=FLOOR)
        value = (lp.exp() * r).sum(1)
        return Buckets(value, r - value[:, None], torch.full_like(lq, -torch.inf))


class ForwardKL(Divergence):
    """KL(q‖p), infinite where the student forbids what the teacher says."""

    passes, adds_q = 1, True

    def online(self, z: Side, t: Side, holes: bool) -> Tensor:
        cross = t.u.sub_(z.u).mul_(t.e)
        cross = cross.masked_fill_(t.e == 0, 0) if holes else cross
        return cross.sum(-1) / t.total + z.log_sum - t.log_sum

    def slope(self, terms: Terms, u: Tensor, v: Tensor, e: Tensor) -> Tensor:
        q = terms.log_q(v).exp_()
        return terms.gradient(u, e, terms.plain + terms.b).addcmul_(q, -terms.b)

    def buckets(self, lp: Tensor, lq: Tensor, parameter: Parameter) -> Buckets:
        q = lq.exp()
        term = (q * (lq.clamp(min=FLOOR) - lp)).masked_fill(q == 0, 0)
        if parameter is not None:
            lq = lq.masked_fill(term >= parameter, -torch.inf)
            term = term.clamp(max=parameter)
        return Buckets(term.sum(1), lq.exp().sum(1, keepdim=True).expand_as(lq), lq)


class ClippedForwardKL(ForwardKL):
    """`sum min(q log(q/p), C)`; aux = the mass of the unclipped q."""

    passes, parameter, adds_q = 2, "divergence_clip", False

    def check(self, value: Any, targets: Tensor, chosen: bool) -> None:
        if chosen and value is not None:
            check_number("divergence_clip", value, above=0)
        elif chosen or value is not None:
            wanted = "a positive number (nats per column) with" if chosen else "None without"
            raise ValueError(
                f"divergence_clip: got {value}, expected {wanted} divergence='clipped_forward_kl'"
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
                f"jsd_beta: got {value}, expected 0 < jsd_beta < 1, or divergence={other!r}"
            )

    def columns(self, lp: Tensor, lq: Tensor, parameter: Parameter, holes: bool) -> tuple:
        p, q = lp.exp(), lq.exp()
        lp = lp.clamp_(min=FLOOR) if holes else lp
        log_mix = self._log_mix(lp, lq, parameter)
        student = torch.linalg.vecdot(p, lp.sub_(log_mix))
        teacher = torch.linalg.vecdot(q, lq.sub_(log_mix))
        return _mixed(parameter, teacher, student), student

    def slope(self, terms: Terms, u: Tensor, v: Tensor, e: Tensor) -> Tensor:
        lq, lp, beta = terms.log_q(v), u - terms.log_sum, terms.parameter
        plain = terms.plain - (1 - beta) * terms.times_b(terms.at.aux)
        lp.sub_(self._log_mix(lp, lq, beta)).mul_(terms.b * (1 - beta) * terms.inverse)
        return lp.addcmul_(u, -terms.c * terms.inverse).add_(plain * terms.inverse).mul_(e)

    def buckets(self, lp: Tensor, lq: Tensor, parameter: Parameter) -> Buckets:
        p, q, lp, lq = lp.exp(), lq.exp(), _known(lp), lq.clamp(min=FLOOR)
        student = lp.masked_fill(p == 0, -torch.inf) + math.log(1 - parameter)
        teacher = lq.masked_fill(q == 0, -torch.inf) + math.log(parameter)
        mix = torch.logaddexp(student, teacher).masked_fill((p == 0) & (q == 0), 0)
        r = lp - mix
        to_student = (p * r).sum(1)
        to_teacher = (q * (lq - mix)).sum(1)
        aux = (1 - parameter) * (r - to_student[:, None])
        value = _mixed(parameter, to_teacher, to_student)
        return Buckets(value, aux, torch.full_like(lq, -torch.inf))

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
        p, lp = lp.exp(), lp.clamp_(min=FLOOR) if holes else lp
        student = torch.linalg.vecdot(p, lp.sub_(lq))
        return _mixed(parameter, teacher, student), student

    def slope(self, terms: Terms, u: Tensor, v: Tensor, e: Tensor) -> Tensor:
        lq, lp, weight = terms.log_q(v), u - terms.log_sum, terms.parameter
        plain = terms.plain + terms.b * weight - (1 - weight) * terms.times_b(terms.at.aux)
        lp.sub_(lq).mul_(terms.b * (1 - weight)).addcmul_(u, -terms.c)
        g = lp.add_(plain).mul_(e).mul_(terms.inverse)
        return g.addcmul_(lq.exp_(), -terms.b * weight)

    def buckets(self, lp: Tensor, lq: Tensor, parameter: Parameter) -> Buckets:
        forward, reverse = ForwardKL().buckets(lp, lq, None), ReverseKL().buckets(lp, lq, None)
        weight = lq.new_full((len(lq), 1), 1) * parameter
        teacher = forward.value.masked_fill(weight[:, 0] == 0, 0)
        aux = weight * forward.aux + (1 - weight) * reverse.aux
        return Buckets(_mixed(weight, teacher, reverse.value), aux, forward.log_q + weight.log())


def _known(lp: Tensor) -> Tensor:
    """Log-masses with 0 for -inf, where p = 0."""
    return lp.masked_fill(lp == -torch.inf, 0)


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


def check_divergence(options: Any, targets: Tensor) -> None:
    """Raise for an unknown divergence, and for parameters (by attribute) that cannot be used."""
    if options.divergence not in tuple(DIVERGENCES):  # a dict would hash it
        raise ValueError(
            f"divergence: got {options.divergence!r}, expected one of {', '.join(DIVERGENCES)}"
        )
    for name, divergence in DIVERGENCES.items():
        if divergence.parameter is not None:
            divergence.check(divergence.of(options), targets, chosen=name == options.divergence)
