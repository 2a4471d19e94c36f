"""Runs rewards so that a bad one costs a sample and never the run.

:class:`Scorer` keeps one worker process (:mod:`dgrpo.rewards.worker`). A reward is first called on
the whole batch. If that raises, hangs or kills the process, it is called again sample by sample,
and the samples that fail by themselves are marked, counted and logged. A worker that hangs is
killed with all that it started, and replaced.

Left out: several workers (each rank has its own already), rewards that see a group at once (they
would change value when called sample by sample).
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgrpo.rewards import worker
from dgrpo.rewards.process import Died, Hung, WorkerProcess

logger = logging.getLogger("dgrpo.rewards")

_GIVE_UP = 8  # samples of a batch on which a reward may hang or die before the rest is left out
_LOGGED = 3  # errors of a reward that are logged a batch


@dataclass(frozen=True)
class Reward:
    """A reward, its weight in the sum and its arguments."""

    path: str
    """Name in dgrpo.rewards, "package.module:name" or "file.py:name"."""
    name: str = ""
    """Name in metrics; empty: the function's."""
    weight: float = 1.0
    """Factor in the sum."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the function."""
    timeout: float | None = None
    """Seconds as in Scorer, for this reward; None: the Scorer's."""

    @property
    def title(self) -> str:
        """The name in metrics."""
        return self.name or self.path.rpartition(":")[2]


class RewardError(NamedTuple):
    """Why a sample has no reward."""

    reward: str
    row: int
    message: str


class RewardResult(NamedTuple):
    """The scores of n samples, on the CPU."""

    total: Tensor  # (n,) fp32 weighted sum, 0 where a reward failed
    parts: dict[str, Tensor]  # (n,) fp32 each: "name" and "name/part"; NaN where there is none
    failed: Tensor  # (n,) bool: leave out of the group's statistics, advantage 0
    errors: list[RewardError]


class Scorer:
    """Calls rewards in a worker process.

    Args:
        rewards: one or more.
        timeout: seconds that a call may take, on a batch or on one sample. After a batch that was
            only slow (each sample by itself is in time) later batches get twice what it took. None:
            call in this process, which a hanging reward stops.
        seed: of the worker's generators of Python and NumPy while it imports rewards; None: random.

    Attributes:
        failures: samples lost so far, by reward.

    Raises:
        ValueError: no rewards, two of one name, one that cannot be imported.
    """

    def __init__(
        self, rewards: Sequence[Reward], timeout: float | None = 30.0, seed: int | None = None
    ):
        titles = [reward.title for reward in rewards]
        if not titles or len(set(titles)) < len(titles):
            raise ValueError(
                f"rewards: got {titles}, expected one or more with different names; set Reward.name"
            )
        self.rewards, self.seed = list(rewards), seed
        self.failures: Counter[str] = Counter()
        self._limits = [r.timeout or timeout for r in rewards]
        self._patience = list(self._limits)  # for a batch
        self._worker: WorkerProcess | None = None
        self._data: dict = {}
        self._functions = []
        if timeout is None:
            self._functions = [worker.load(reward.path) for reward in rewards]
        else:
            self._restart()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the worker process."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: dict[str, Sequence],
        seed: int | None = None,
    ) -> RewardResult:
        """Score n samples.

        Args:
            prompts: n prompts, text or chat messages.
            completions: n texts.
            columns: n values each, of the types that JSON knows (arrays become lists, all else
                text). Samples of a group should hold the same object, which is then sent once.
            seed: of the worker's generators of Python and NumPy for this call; None: they go on.

        Raises:
            ValueError: lists of different lengths.
        """
        n = len(completions)
        for name, values in {"prompts": prompts, **columns}.items():
            if len(values) != n:
                raise ValueError(f"{name}: got {len(values)} values for {n} completions")
        self._data = {"prompts": prompts, "completions": completions, "columns": columns}
        self._data["seed"] = seed
        if self._worker is not None and n:
            self._send_data()
        total, failed = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        parts: dict[str, Tensor] = {}
        errors = []
        for i, reward in enumerate(self.rewards):
            values, messages = self._score(i, n) if n else ({"reward": []}, {})
            for name, column in values.items():
                title = reward.title if name == "reward" else f"{reward.title}/{name}"
                parts[title] = torch.tensor(
                    [float("nan") if v is None else v for v in column], dtype=torch.float32
                )
            errors += [RewardError(reward.title, row, messages[row]) for row in sorted(messages)]
            bad = parts[reward.title].isnan()
            failed |= bad
            total += reward.weight * parts[reward.title].nan_to_num(0.0)
            self._report(reward.title, messages)
        return RewardResult(total.masked_fill(failed, 0.0), parts, failed, errors)

    def _score(self, i: int, n: int) -> tuple[dict[str, list], dict[int, str]]:
        """Values by part, None where there is none, and the message of each failed row."""
        reply = self._ask({"call": i}, self._patience[i])
        if "error" not in reply:
            return reply["values"], dict(reply["errors"])
        if reply.get("wrong") or n == 1:
            return {"reward": [None] * n}, dict.fromkeys(range(n), reply["error"])
        slow = bool(reply.get("hung"))
        values: dict[str, list] = {"reward": [None] * n}
        messages: dict[int, str] = {}
        broken = 0
        start = time.monotonic()
        for row, reply in self._one_by_one(i, n):
            if "error" in reply:
                messages[row] = reply["error"]
                broken += bool(reply.get("broken"))
                if broken >= _GIVE_UP:
                    rest = f"not scored: the reward hung or died on {broken} samples before"
                    messages |= {r: rest for r in range(row + 1, n)}
                    break
                continue
            messages |= dict(reply["errors"])
            for name, column in reply["values"].items():
                values.setdefault(name, [None] * n)[row] = column[0]
        if slow and not broken:
            self._patience[i] = max(self._patience[i], 2 * (time.monotonic() - start))
        return values, messages

    def _one_by_one(self, i: int, n: int):
        """(row, reply) of a call on each row; the worker is replaced where it hangs or dies."""
        row = 0
        while row < n:
            request = {"call": i, "rows": list(range(row, n))}
            while row < n:
                reply = self._ask(request, self._limits[i])
                request = None
                yield row, reply
                row += 1
                if reply.get("broken"):
                    break

    def _ask(self, request: dict | None, limit: float | None) -> dict:
        """Send a request (None: one is under way) and wait for one reply."""
        if self._worker is None:
            return self._call_here(request)
        try:
            if request is not None:
                self._worker.send(request)
            return self._worker.receive(limit)
        except (Hung, Died) as error:
            self._restart()
            self._send_data()
            return {"error": str(error), "broken": True, "hung": isinstance(error, Hung)}

    def _call_here(self, request: dict | None) -> dict:
        if request is not None:
            self._here = request["call"], iter(request.get("rows") or [None])
        call, rows = self._here
        row = next(rows)
        options = self.rewards[call].options
        try:
            return worker.invoke(
                self._functions[call], options, self._data, None if row is None else [row]
            )
        except Exception as error:
            return worker.failure(error)

    def _restart(self) -> None:
        self.close()
        self._worker = WorkerProcess(
            {
                "sys_path": sys.path,
                "rewards": [asdict(reward) for reward in self.rewards],
                "seed": self.seed,
            }
        )

    def _send_data(self) -> None:
        packed = {name: worker.pack(self._data[name]) for name in ("prompts", "completions")}
        columns = self._data["columns"]
        packed["columns"] = {name: worker.pack(values) for name, values in columns.items()}
        packed["seed"] = self._data["seed"]
        try:
            self._worker.send({"data": packed})
        except Died:  # since the last batch
            self._restart()
            self._worker.send({"data": packed})

    def _report(self, title: str, messages: dict[int, str]) -> None:
        self.failures[title] += len(messages)
        for row in sorted(messages)[:_LOGGED]:
            logger.warning("reward %s failed on sample %d: %s", title, row, messages[row])
        if len(messages) > _LOGGED:
            logger.warning("reward %s failed on %d samples of this batch", title, len(messages))


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: dict[str, Sequence],
    timeout: float | None = 30.0,
) -> RewardResult:
    """Score once, with a worker process for this call alone; see :class:`Scorer`."""
    with Scorer(rewards, timeout) as scorer:
        return scorer(prompts, completions, columns)
