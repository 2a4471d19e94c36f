"""Settings: their tree, the method presets, and how they are read from YAML and overrides."""

from dgrpo.trainer.config.help import describe, settings_help
from dgrpo.trainer.config.load import dump, load, parse_file, validate
from dgrpo.trainer.config.method import PRESETS, Coefficient, Method, Schedule
from dgrpo.trainer.config.run import Evaluate, RunSettings
from dgrpo.trainer.config.settings import (
    Data,
    DataSource,
    Model,
    Optimizer,
    Reward,
    Teacher,
)

__all__ = [
    "PRESETS",
    "Coefficient",
    "Data",
    "DataSource",
    "Evaluate",
    "Method",
    "Model",
    "Optimizer",
    "Reward",
    "RunSettings",
    "Schedule",
    "Teacher",
    "describe",
    "dump",
    "load",
    "parse_file",
    "settings_help",
    "validate",
]
