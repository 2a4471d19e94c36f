"""Run rewards so that a bad one costs a sample and never the run.

Where a reward raises, hangs or dies on the whole batch, it is called again sample by sample, and
those that fail by themselves are marked, counted and logged. A worker that hangs is replaced. The
second pass has the batch's time limit once more, each sample at most half of what is left.
"""

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgrpo.extras import load_function
from dgrpo.longblocks.rewards import worker
from dgrpo.longblocks.rewards.process import Lost, WorkerProcess
from dgrpo.trainer.config import Reward

logger = logging.getLogger("dgrpo.longblocks.rewards")

_GIVE_UP = 8  # samples of a batch on which a reward may hang or die before the rest is left out
_LOGGED = 3  # different errors of a reward that are logged per batch
_REST = 16  # the second pass ends when less than this part of its time is left


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


class Scorer(AbstractContextManager):
    """Call rewards in a worker process.

    Args:
        timeout: seconds that a reward may take on a batch, and again on its samples one by one
            where the first call fails. None: call in this process, which a hanging reward stops.
        seed: of the worker's generators of Python and NumPy while it imports rewards; None: random.

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
        self.last_error: str | None = None  # why the last one was lost, and the reward's name
        self._limit = math.inf if timeout is None else timeout
        self._waited = 0.0  # seconds for the reward at hand on this batch, in the worker
        self._worker: WorkerProcess | None = None
        if timeout is None:
            self._functions = [load_function("rewards", r.path, worker.HOME) for r in rewards]
        else:
            self._restart()

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
        """Score n samples. Raises ValueError where the lists differ in length.

        Args:
            prompts: texts or chat messages.
            columns: n values each, of the types that JSON knows (arrays become lists, all else
                text). Samples of a group should hold the same object, which is then sent once.
            seed: of the worker's generators of Python and NumPy for this call; None: they go on.
        """
        n = len(completions)
        self._data = {**columns, "prompts": prompts, "completions": completions}
        self._data_seed = seed
        for name, values in self._data.items():
            if len(values) != n:
                raise ValueError(f"{name}: got {len(values)} values for {n} completions")
        if self._worker is not None and n:
            self._send_data()
        total, failed = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        parts: dict[str, Tensor] = {}
        errors = []
        for i, reward in enumerate(self.rewards):
            values, messages = self._score(i, n) if n else ({"reward": []}, {})
            for name, column in values.items():
                title = reward.title if name == "reward" else f"{reward.title}/{name}"
                numbers = [math.nan if value is None else value for value in column]
                parts[title] = torch.tensor(numbers, dtype=torch.float32)
            errors += [RewardError(reward.title, row, messages[row]) for row in sorted(messages)]
            failed |= parts[reward.title].isnan()
            total += reward.weight * parts[reward.title].nan_to_num(0.0)
            self._report(reward.title, messages, n)
        return RewardResult(total.masked_fill(failed, 0.0), parts, failed, errors)

    def _score(self, i: int, n: int) -> tuple[dict[str, list], dict[int, str]]:
        """Values by part, None where there is none, and the message of each failed row."""
        limit, self._waited = self._limit, 0.0
        reply = self._ask(i, None, limit)
        if "error" not in reply:
            return reply["values"], dict(reply["errors"])
        whole = reply["error"]
        if reply.get("wrong") or n == 1:
            return {"reward": [None] * n}, dict.fromkeys(range(n), whole)
        values: dict[str, list] = {"reward": [None] * n}
        messages: dict[int, str] = {}
        end, broken = self._waited + limit, 0
        for row in range(n):
            left = end - self._waited
            if left < limit / _REST:
                reply = {"error": "not scored: the batch's time was up"}
            elif broken >= _GIVE_UP:
                reply = {"error": f"not scored: the reward hung or died on {broken} samples before"}
            else:  # one that hangs leaves time for those behind it
                reply = self._ask(i, row, left / 2)
            if "error" in reply:
                also = "broken" in reply and reply["error"] != whole
                messages[row] = reply["error"] + (f" (the whole batch: {whole})" if also else "")
            broken += "broken" in reply
            messages |= dict(reply.get("errors", ()))
            for name, column in reply.get("values", {}).items():
                values.setdefault(name, [None] * n)[row] = column[0]
        if self._waited > limit:
            logger.warning(
                "reward %s took %.1f s for a batch of %d and its samples one by one, over the "
                "limit of %g s; %d have no score; if it is only slow, raise rewards.timeout",
                *(self.rewards[i].title, self._waited, n, limit, len(messages)),
            )
        return values, messages

    def _ask(self, i: int, row: int | None, limit: float) -> dict:
        """The reply of reward i on a row (None: all); a worker that hangs or dies is replaced."""
        reward = self.rewards[i]
        if self._worker is None:
            return worker.answer(self._functions[i], reward.options, self._data, row)

        def tell(seconds: float) -> None:
            text = "reward %s: no reply for %g s (limit %g s)"
            logger.warning(text, reward.title, seconds, limit)

        start = time.monotonic()
        try:
            self._worker.send({"call": i, "row": row})
            reply = self._worker.receive(limit, tell)
        except Lost as error:
            reply = {"error": str(error), "broken": True}
        self._waited += time.monotonic() - start
        if "broken" in reply:
            self._restart()
            self._send_data()
        return reply

    def _restart(self) -> None:
        self.close()
        rewards = [reward.model_dump() for reward in self.rewards]
        self._worker = WorkerProcess({"sys_path": sys.path, "rewards": rewards, "seed": self.seed})

    def _send_data(self) -> None:
        packed = {name: worker.pack(values) for name, values in self._data.items()}
        message = {"data": packed, "seed": self._data_seed}
        try:
            self._worker.send(message)
        except Lost:  # since the last batch
            self._restart()
            self._worker.send(message)

    def _report(self, title: str, messages: dict[int, str], n: int) -> None:
        """Log the samples that a reward lost, the same reason once."""
        if not messages:
            return
        self.last_error = f"reward {title}: {messages[min(messages)]}"
        counts = Counter(messages[row] for row in sorted(messages))
        for message, count in list(counts.items())[:_LOGGED]:
            where = f"all {n} samples" if count == n else f"{count} of {n} samples"
            if count == 1:
                where = f"sample {next(row for row in messages if messages[row] == message)}"
            logger.warning("reward %s failed on %s: %s", title, where, message)
        if len(counts) > _LOGGED:
            logger.warning("reward %s failed on %d samples of this batch", title, len(messages))
