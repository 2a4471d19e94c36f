"""Completions sampled from the policy."""

from dgrpo.trainer.rollout.hf import HFSampler
from dgrpo.trainer.rollout.sampling import Rollout, Sampling

__all__ = ["HFSampler", "Rollout", "Sampling"]
