"""What a comparison runs: the settings of every stage, and what is said of all of them.

A file such as small.yaml holds the stages of `dgrpo train` and a group `compare`. The stages whose
names end in a number make the models that all methods share (those of one name in a row), `cold`
is run once per seed, and every further stage is a method, run once per seed from its `cold`.
A method's name up to the first "-" is the family whose learning rate it takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from dgrpo.trainer.config import RunSettings, load
from dgrpo.trainer.config.help import explain
from dgrpo.trainer.config.load import override, parse_file
from dgrpo.trainer.config.settings import Settings

HERE = Path(__file__).parent
COLD = "cold"


class Compare(Settings):
    """The group `compare` of a file."""

    seeds: list[NonNegativeInt] = Field(min_length=1)
    """Seeds of the cold start and of each method after it."""
    rates: dict[str, list[float]]
    """Learning rates tried for each family, with `rate_seed`, on the validation prompts."""
    rate_seed: NonNegativeInt = 0
    """Seed of the runs that choose the learning rates; none of `seeds`."""
    prompts: PositiveInt = 256
    """Training prompts, each with one answer of the teacher; three times as many are `extra`."""
    test: PositiveInt = 2048
    """Test prompts, seen by nothing but the last scores."""
    workers: PositiveInt = 2
    """Runs side by side, each with one thread."""


class Plan:
    """All runs of one comparison below one folder.

    Args:
        file: a file such as small.yaml, or a list of overrides of it such as gpu.yaml.
        out: folder of the runs.
        overrides: "key=value" over the file, as `dgrpo train` takes them.

    Raises:
        ValueError: a setting that is wrong, with its name.
    """

    def __init__(self, file: Path, out: Path, overrides: Sequence[str] = ()):
        text = file.read_text()
        changes = yaml.safe_load(text)
        if isinstance(changes, list):  # a size that differs from the small one in these settings
            text, overrides = (HERE / "small.yaml").read_text(), [*changes, *overrides]
        out.mkdir(parents=True, exist_ok=True)
        settings = out / "settings.yaml"
        settings.write_text(text.replace("runs/compare", out.as_posix()))
        moved = [text.replace("runs/compare", out.as_posix()) for text in overrides]
        tree = override(parse_file(settings), moved)
        self.out, self.compare = out, _validate(tree.pop("compare", {}))
        # Without anchors, and without the group that only this program knows.
        settings.write_text(yaml.dump(tree, Dumper=_Plain, sort_keys=False))
        self.stages = load(settings)
        self.methods = [n for n in self.stages if n != COLD and not re.search(r"-\d+$", n)]
        missing = {family(n) for n in self.methods} - set(self.compare.rates)
        if missing:
            raise ValueError(f"compare.rates: got none for {sorted(missing)}, expected some")

    @property
    def shared(self) -> dict[str, list[str]]:
        """Stages of each shared model in order, {"teacher": ["teacher-1", ...], ...}."""
        chains: dict[str, list[str]] = {}
        for name in self.stages:
            if name != COLD and name not in self.methods:
                chains.setdefault(name.rpartition("-")[0], []).append(name)
        return chains

    @property
    def task(self) -> dict[str, Any]:
        """Options of the rows that are held out during training: the task of all methods."""
        return dict(self.stages[COLD].evaluate.sources[0].options)

    def cold(self, seed: int) -> RunSettings:
        """The cold start of a seed."""
        return _changed(self.stages[COLD], seed=seed, out=f"{self.out}/cold/seed-{seed}")

    def run(
        self, method: str, seed: int, rates: Mapping[str, float], folder: str = "methods"
    ) -> RunSettings:
        """A method with one seed and its family's rate, from the cold start of the same seed."""
        stage = self.stages[method]
        model, cold = stage.model, self.stages[COLD]
        if model.name == f"{cold.out}/export":
            model = _changed(model, name=f"{self.cold(seed).out}/export")
        return _changed(
            stage,
            seed=seed,
            out=f"{self.out}/{folder}/{method}/seed-{seed}",
            model=model,
            optimizer=_changed(stage.optimizer, lr=rates[family(method)]),
        )

    def candidates(self) -> dict[tuple[str, float], RunSettings]:
        """The runs that choose the learning rates, by family and rate."""
        seed = self.compare.rate_seed
        return {
            (name, rate): self.run(name, seed, {name: rate}, folder=f"rates/{rate:g}")
            for name, rates in self.compare.rates.items()
            for rate in rates
        }


def family(method: str) -> str:
    """The method whose learning rate a method takes: "dgrpo" of "dgrpo-beta-0_1"."""
    return method.partition("-")[0]


def _changed(settings: Any, **values: Any) -> Any:
    """A checked copy with other values."""
    return type(settings).model_validate({**settings.model_dump(), **_plain(values)})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.model_dump() if isinstance(v, Settings) else v for k, v in values.items()}


def _validate(values: Any) -> Compare:
    try:
        found = Compare.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join("compare." + explain(e) for e in error.errors())) from None
    if found.rate_seed in found.seeds:
        raise ValueError(
            f"compare.rate_seed: got {found.rate_seed}, expected none of the seeds {found.seeds}; "
            "rates chosen on a run must not be judged by it"
        )
    return found


class _Plain(yaml.SafeDumper):
    """Writes a value that occurs twice in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
