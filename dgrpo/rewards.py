"""LongBlocks' rewards by the short name that rows of data carry ("dgrpo.rewards:exact_match")."""

from dgrpo.longblocks.rewards import *  # noqa: F403
from dgrpo.longblocks.rewards import __all__ as __all__
