"""Group-relative advantages: the reward of a sample against the other samples of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from dgrpo.objectives.sequences import check_sequence_ids, sequence_sums


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    scale: str = "std",
    leave_one_out: bool = False,
    valid: Tensor | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """`A_i = (r_i - mean) / (std + eps)` over the valid samples of i's group. (S,), no host sync.

    `rewards` (S,) and `groups` (S,) int64, 0 … S - 1 in any order (-1: no group, A = 0). Samples
    that are not `valid` (S,) bool are left out of their group's statistics and get A = 0; their
    reward may be NaN. A group with one valid sample gets A = 0.

    * `scale="std"`: GRPO (2402.03300), with the unbiased standard deviation.
    * `scale="none"`: Dr.GRPO (2503.20783), no division.
    * `leave_one_out`: the mean is that of the *other* samples, `G / (G - 1)` times the difference
      to the group's own mean (RLOO, 2402.14740; published with `scale="none"`).

    Integer rewards give fp32 advantages. Raises ValueError and TypeError on bad arguments.
    """
    if scale not in ("std", "none"):
        raise ValueError(f'scale: got {scale!r}, expected "std" or "none"')
    check_sequence_ids(groups, rewards, "groups")
    if valid is not None and valid.shape != rewards.shape:
        wanted = f"expected one bool per reward, {tuple(rewards.shape)}"
        raise ValueError(f"valid: got shape {tuple(valid.shape)}, {wanted}")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    if valid is not None:
        groups = torch.where(valid, groups, -1)
    inside = groups >= 0
    count = sequence_sums(torch.ones_like(rewards), groups)
    mean = sequence_sums(rewards, groups) / count.clamp(min=1)
    centred = torch.where(inside, rewards - mean, torch.zeros_like(rewards))
    others = (count - 1).clamp(min=1)
    std = (sequence_sums(centred.square(), groups) / others).sqrt()
    advantages = centred * count / others if leave_one_out else centred
    return advantages / (std + eps) if scale == "std" else advantages
