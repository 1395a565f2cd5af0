"""Mixtures and orders that are pure functions of an index: nothing is drawn, nothing is kept, nothing is lost."""

import math
from collections.abc import Mapping
from fractions import Fraction
from hashlib import blake2b

import numpy as np

from ..core.errors import ConfigError

PERIOD = 1 << 16  # the longest sequence after which a mixture begins again
ROUNDS = 6


class Mixture:
    """Which source a sample comes from, by the sample's number.

    After any number of samples, each source has given its share of them, rounded up or down (the quota method of
    Balinski and Young 1975, over the numbers of samples as seats). Shares are exact where they have a common unit of
    at least 1/65,536, and else rounded to it. ConfigError for weights that are not positive.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights or not all(0 < weight < math.inf for weight in weights.values()):
            raise ConfigError(f"weights {dict(weights)}, expected one source at least and numbers above 0")
        self.names = list(weights)
        self.order = _quota_order(_seats([Fraction(str(weight)) for weight in weights.values()]))
        each = self.order[:, None] == np.arange(len(self.names))
        self.before = np.concatenate((np.zeros((1, len(self.names)), dtype=np.int64), each.cumsum(0)))

    def __call__(self, index: int) -> tuple[str, int]:
        """The source of sample `index`, and how many samples before it come from the same source."""
        turn, place = divmod(index, len(self.order))
        source = int(self.order[place])
        return self.names[source], turn * int(self.before[-1, source]) + int(self.before[place, source])


def _seats(weights: list[Fraction]) -> list[int]:
    """Whole numbers in the proportion of the weights, PERIOD of them at most."""
    unit = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * unit) for weight in weights]
    whole = [each // math.gcd(*whole) for each in whole]
    if sum(whole) <= PERIOD:
        return whole
    exact = [Fraction(each * PERIOD, sum(whole)) for each in whole]
    return [max(1, round(each)) for each in exact]


def _quota_order(seats: list[int]) -> np.ndarray:
    """Sources in the order in which they come, int64 [sum of seats]."""
    total, given = sum(seats), [0] * len(seats)
    order = np.zeros(total, dtype=np.int64)
    for n in range(total):
        free = [s for s in range(len(seats)) if given[s] * total < seats[s] * (n + 1)]  # none beyond its share
        chosen = min(free, key=lambda s: (given[s] + 1) / seats[s])
        given[chosen] += 1
        order[n] = chosen
    return order


def permuted(index: int, length: int, key: str) -> int:
    """Where a number below `length` goes in the permutation that `key` names.

    A Feistel network over the next square of a power of two, walked until the number is below `length` again: a
    permutation of any size that takes no room.
    """
    if not 0 <= index < length:
        raise IndexError(index)
    half = max(2, -(-(length - 1).bit_length() // 2))
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(ROUNDS):
            mixed = blake2b(f"{key} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
        index = left << half | right
        if index < length:
            return index
