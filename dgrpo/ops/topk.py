"""The divergence to a top-k teacher: K columns and one bucket for all others.

    u_b = log-mass of bucket b;  D over the buckets' p and q;  dD/dz_v = p_v (r_b(v) - mean r)

A bucket without columns takes no part; one whose columns the student forbids has p = 0. (R, K)
arithmetic in torch: the kernels see the row with the K columns taken out, and get back three
numbers per row for the tail (see `RowStats`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgrpo.ops.call import Call
from dgrpo_kernels.rows import Logits, RowStats

LEAST_TAIL = 1e-7  # the teacher's tail mass is never taken as less


class TopKColumns:
    """A top-k teacher's columns in the rows of one part: taken out, merged, put back.

    All (R, K): `ids`, of this shard, -1 = absent; `logprobs` of the student; `slope`, dD/dz;
    `chain`, d logit / d raw; `policy_probs` and `policy_chain`, as the policy term sees them.
    """

    def __init__(self, call: Call, z: Logits, part: slice):
        """Take the columns out of `z`."""
        self.call, self.part, self.z = call, part, z
        index = call.targets[part].clamp(0, call.shard.columns - 1)
        raw = z.raw.gather(1, index[:, None])[:, 0]
        raw = raw if z.bias is None else raw + z.bias[index]
        self.target = call.shard.held(raw, call.targets[part])  # (R,) raw logits
        self.global_ids = call.topk.token_ids.flatten(0, -2)[call.rows[part]]
        self.ids = call.shard.local_ids(self.global_ids).contiguous()
        # (R, K) raw logits of the student, -inf where absent
        self.taken = call.shard.held(call.backend.topk_take(z.raw, z.bias, self.ids))

    def merge(self, stats: Tensor) -> None:
        """Finish `stats` (11, R), measured over the tail, with the columns."""
        call, part, z, taken = self.call, self.part, self.z, self.taken
        out = RowStats(*stats.unbind(0))
        rows, total = call.rows[part], call.shard.total
        # A column outside the compared vocabulary counts towards the tail bucket.
        there = (self.global_ids >= 0) & (self.global_ids < total)
        given = call.topk.logprobs.flatten(0, -2)[rows].to(taken.dtype)
        given = given.masked_fill(~there, -torch.inf)
        columns, self.chain = _logits(taken, z)
        target = _logits(self.target[:, None], z)[0][:, 0]
        tail_entropy = out.entropy.clone()
        top, log_sum, tail, lp = _merge(out.max_z, out.log_sum_z, columns)
        lq = given.to(lp.dtype)
        rest = tail_logprob(given).to(lp.dtype)
        has_tail = there.sum(1) < total
        both = tail[:, None], rest.masked_fill(~has_tail, -torch.inf)[:, None]
        buckets = torch.cat([both[0], lp], 1), torch.cat([both[1], lq], 1)
        own = call.parameter_at(part)
        own = own[:, None] if isinstance(own, Tensor) else own
        value, aux, log_q = call.formulas.buckets(*buckets, own)
        self.slope = lp.exp() * aux[:, 1:] - log_q[:, 1:].exp()
        aux, log_q = aux[:, 0], log_q[:, 0]
        known = lp.masked_fill(lp == -torch.inf, 0)
        entropy = tail.exp() * (tail_entropy - tail).nan_to_num(posinf=0.0)
        entropy = entropy - (lp.exp() * known).sum(1)
        policy_top, policy_sum, policy, self.policy_chain = top, log_sum, lp, self.chain
        if call.round_policy:
            coarse = z._replace(raw=taken, bias=None)
            columns, self.policy_chain = _logits(taken.bfloat16().to(taken.dtype), coarse)
            target = self.target.bfloat16().to(taken.dtype)[:, None]
            target = _logits(target, coarse)[0][:, 0]
            policy_top, policy_sum, _, policy = _merge(out.policy_max, out.policy_log_sum, columns)
        self.logprobs, self.policy_probs = lp, policy.exp()
        gone = (log_q == -torch.inf) | (out.log_sum_z == -torch.inf)
        out.max_t.copy_(out.max_z)
        out.log_sum_t.copy_((out.log_sum_z - log_q).masked_fill(gone, torch.inf))
        out.max_z.copy_(top)
        out.log_sum_z.copy_(log_sum)
        out.policy_max.copy_(policy_top)
        out.policy_log_sum.copy_(policy_sum)
        logprobs = (target - policy_top) - policy_sum
        out.logprobs.copy_(logprobs.where(call.targets_known[part], torch.nan))
        out.entropy.copy_(entropy)
        absent = (self.global_ids < 0).all(1) & (self.global_ids.shape[1] > 0)
        out.divergence.copy_(value.masked_fill(absent, 0))
        out.aux.copy_(aux)
        out.teacher_logprobs.copy_(self._target_logprobs(given, rows).masked_fill(absent, 0))

    def _target_logprobs(self, given: Tensor, rows: Tensor) -> Tensor:
        """(R,) the teacher's log-probability of the target: its own, or that of its bucket."""
        call = self.call
        if call.topk.target_logprobs is not None:
            return call.topk.target_logprobs.reshape(-1)[rows].to(given.dtype)
        tail = tail_logprob(given).to(given.dtype)
        if not given.shape[1]:
            return tail
        here = self.global_ids == (call.targets[self.part] + call.shard.start)[:, None]
        return torch.where(here.any(1), given.masked_fill(~here, -torch.inf).amax(1), tail)

    def put(self, stats: Tensor, coef: Tensor, grad: Tensor) -> None:
        """Write the columns' dL/draw into G, from (3, R) coefficients a, b, c."""
        a, b, c = coef[:, :, None].unbind(0)
        entropy = RowStats(*stats.unbind(0)).entropy
        here = (self.ids == self.call.targets[self.part][:, None]).to(entropy.dtype)
        p = self.logprobs.exp()
        own = self.logprobs.masked_fill(p == 0, 0)
        g = (b * self.slope).masked_fill(b == 0, 0)
        g = g - (c * p * (own + entropy[:, None])).masked_fill(c == 0, 0)
        policy = (a * (here - self.policy_probs)).masked_fill(a == 0, 0)
        values = g * self.chain + policy * self.policy_chain
        self.call.backend.topk_put(grad, self.ids, values)


def _logits(raw: Tensor, at: Logits) -> tuple[Tensor, Tensor]:
    """Logits of raw values (bias added) and their slope; -inf stays, with slope 0."""
    absent = raw == -torch.inf
    x = raw.masked_fill(absent, 0) * at.scale
    slope = torch.full_like(x, at.scale / at.temperature)
    if at.softcap is not None:
        bent = torch.tanh(x / at.softcap)
        x, slope = at.softcap * bent, slope * (1 - bent * bent)
    return (x / at.temperature).masked_fill(absent, -torch.inf), slope.masked_fill(absent, 0)


def _merge(top: Tensor, log_sum: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tail and columns into one row: (max, log-sum), log-mass of the tail, log p of the columns."""
    top = top.masked_fill(log_sum == -torch.inf, -torch.inf)
    best = torch.maximum(top, columns.amax(-1)) if columns.shape[1] else top
    masses = torch.cat([((top - best) + log_sum)[:, None], columns - best[:, None]], 1)
    masses = masses.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    total = masses.logsumexp(1)
    masses = masses - total[:, None]
    return best, total, masses[:, 0], masses[:, 1:]


def tail_logprob(logprobs: Tensor) -> Tensor:
    """log(1 - sum of a teacher's top-k probabilities), (R,) fp64: fp32 would lose a small tail."""
    return torch.log1p(-logprobs.double().exp().sum(1).clamp(max=1 - LEAST_TAIL))
