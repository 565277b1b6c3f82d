"""Random choices of the synthetic world that are the same on every machine, whatever versions are installed."""

import random
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Dice:
    """Random choices from a key, such as (seed, split, index).

    Only `random.Random.random` is used, whose numbers the Python language fixes for a seed, and never a global state.
    """

    def __init__(self, *key: int | str) -> None:
        self._random = random.Random(":".join(str(part) for part in key))

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * self._random.random()

    def below(self, bound: int) -> int:
        """Return a whole number in [0, bound)."""
        return int(self._random.random() * bound)

    def chance(self, probability: float) -> bool:
        """Return `True` with a probability."""
        return self._random.random() < probability

    def choice(self, options: Sequence[_T], weights: Sequence[float] | None = None) -> _T:
        """Return one of the options, in proportion to the weights, if given."""
        if weights is None:
            return options[self.below(len(options))]
        place = self.uniform(0, sum(weights))
        for option, weight in zip(options, weights, strict=True):
            place -= weight
            if place < 0:
                return option
        return options[-1]

    def shuffled(self, options: Sequence[_T]) -> list[_T]:
        """Return the options in another order."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest))]
