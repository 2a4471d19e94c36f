"""Completions sampled from the policy: the protocol, and the sampler that needs nothing else."""

from dgrpo.trainer.rollout.hf import HFSampler
from dgrpo.trainer.rollout.sampling import Rollout, Sampler, Sampling

__all__ = ["HFSampler", "Rollout", "Sampler", "Sampling"]
