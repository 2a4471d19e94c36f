"""Tells when a run goes on but learns nothing: equal rewards, a loss and gradient of exactly 0."""

from __future__ import annotations

STEPS = 3  # in a row, before it is told


class Standstill:
    """Counts the steps in a row that can teach nothing; each stretch of them is told once."""

    def __init__(self):
        self.reward: float | None = None
        self.equal = 0
        self.zero = 0

    def warnings(
        self, loss: float, norm: float, lowest: float | None, highest: float | None
    ) -> list[str]:
        """What is to be told after a step.

        Args:
            loss, norm: the step's loss, and the norm of its gradient.
            lowest, highest: its rewards; None where it has none.
        """
        if lowest is None or lowest != highest:
            self.equal = 0
        else:
            self.equal = self.equal + 1 if lowest == self.reward else 1
        self.reward = lowest
        self.zero = self.zero + 1 if loss == 0.0 and norm == 0.0 else 0
        found = []
        if self.equal == STEPS:
            found.append(
                f"every reward of {STEPS} steps in a row is {lowest:g}, which tells no completion "
                "from another; look at the reward, and whether the prompts are too hard or too easy"
            )
        if self.zero == STEPS:
            found.append(
                f"loss and gradient are exactly 0 in {STEPS} steps in a row: nothing is learned; "
                "no sample has an advantage, a teacher or a token with loss"
            )
        return found
