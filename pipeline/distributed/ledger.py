"""The ledger of a chain, without heavy imports: a chain's actors wait for its process before they load."""

from collections import Counter


class Ledger:
    """An actor on the driver's node that counts the work that each stage has begun and not ended.

    What an actor has begun stays begun when the actor dies.
    """

    def __init__(self) -> None:
        self._begun: Counter[tuple[int, int]] = Counter()  # by (position of the stage, unit or LOADING)

    def begin(self, position: int, work: int) -> int:
        """Return how often this stage has begun this work and not ended it, this time included."""
        self._begun[position, work] += 1
        return self._begun[position, work]

    def end(self, position: int, work: int) -> None:
        del self._begun[position, work]
