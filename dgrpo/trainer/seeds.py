"""Seeds of the global generators that hooks draw from.

A reward's numbers depend on the run's seed, the rank and the step alone: on no other hook, no
evaluation in between, and not on whether it runs in this process or in the worker.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

from dgrpo.distributed import ranks


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def call_seed(seed: int, step: int) -> int:
    """The seed of this rank's calls of a step, below 2**32."""
    return int(numpy.random.SeedSequence([seed, ranks().data_rank, step]).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's and NumPy's generators within; they go on as before after it."""
    python, arrays = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
