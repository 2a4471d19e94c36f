"""Sequences packed into micro-batches without padding.

A `Sample` is one prompt with its completion, on the CPU. `pack` lays samples end to end into
`Micro`s: token n of a micro carries the target that its hidden state predicts, so nothing is
shifted later, and only the positions before unmasked completion tokens are rows of the loss head.
A prompt is laid out once for its samples in a micro: its tokens but the last are a prefix that all
see (`dgrpo.trainer.attention.packed`); the last is repeated, as it predicts another first token in
each. `balanced_count` gives all ranks the same number of micros, as FSDP needs.

Legend: P prompt tokens, C completion tokens, T tokens of a micro, S sequences in it, n tokens with
loss.
"""

from dgrpo.trainer.batch.micro import Micro
from dgrpo.trainer.batch.packing import balanced_count, filler, pack
from dgrpo.trainer.batch.sample import IGNORED, Origin, Sample, Sampled, Scored

__all__ = [
    "IGNORED",
    "Micro",
    "Origin",
    "Sample",
    "Sampled",
    "Scored",
    "balanced_count",
    "filler",
    "pack",
]
