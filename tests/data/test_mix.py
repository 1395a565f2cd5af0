"""Mixtures hold their shares at every moment; permutations miss nothing and are no order that anyone would know."""

from collections import Counter

import numpy as np
import pytest

from sightline.core.errors import ConfigError
from sightline.data.mix import PERIOD, Mixture, permuted

WEIGHTS = [
    {"a": 1.0},
    {"a": 0.7, "b": 0.3},
    {"a": 1.0, "b": 1.0, "c": 1.0},
    {"a": 1.0, "b": 0.2, "c": 0.2, "d": 0.03},  # Flamingo's
    {"a": 158_000, "b": 83_000, "c": 9_000, "d": 50_000, "e": 22_000},
    {"a": 73.85, "b": 17.18, "c": 6.15, "d": 2.82},  # IDEFICS's
    {"a": 1000, "b": 1, "c": 1, "d": 1, "e": 1},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_after_any_number_of_samples_each_source_has_given_its_share(weights: dict[str, float]) -> None:
    mixture, given = Mixture(weights), Counter[str]()
    total = sum(weights.values())
    for n in range(3000):
        name, before = mixture(n)
        assert before == given[name]  # every sample of a source, one after the other
        given[name] += 1
        for source, weight in weights.items():
            assert abs(given[source] - (n + 1) * weight / total) < 1 + 1e-9
    far = 10**9 * len(mixture.order) + 7  # turns of a mixture, and a bit
    name, before = mixture(far)
    assert name == mixture(7)[0] and before / far == pytest.approx(weights[name] / total, abs=1 / PERIOD)


def test_of_two_sources_any_stretch_holds_their_shares() -> None:
    mixture = Mixture({"a": 0.7, "b": 0.3})
    drawn = np.array([mixture(n)[0] == "a" for n in range(500)]).cumsum()
    for length in (1, 7, 10, 33, 100):
        found = drawn[length:] - drawn[:-length]
        assert np.abs(found - 0.7 * length).max() <= 1 + 1e-9


def test_shares_without_a_small_common_unit_are_rounded() -> None:
    mixture = Mixture({"a": 0.123456789, "b": 1.0, "c": 1e-9})
    assert abs(len(mixture.order) - PERIOD) <= 2
    counts = Counter(mixture(n)[0] for n in range(20_000))
    assert counts["a"] == pytest.approx(20_000 * 0.123456789 / 1.123456790, abs=1.5)


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_weights_that_cannot_be_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected one source at least and numbers above 0"):
        Mixture(weights)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_a_permutation_meets_everything_once(length: int) -> None:
    found = [permuted(i, length, "0 0") for i in range(length)]
    assert sorted(found) == list(range(length))
    if length >= 16:
        assert found != [permuted(i, length, "0 1") for i in range(length)] != list(range(length))


def test_a_permutation_of_a_billion_takes_no_room_and_looks_random() -> None:
    length = 10**9
    found = np.array([permuted(i, length, "7 0") for i in range(4000)])
    assert len(set(found.tolist())) == 4000 and found.min() >= 0 and found.max() < length
    shares = np.histogram(found, bins=10, range=(0, length))[0]
    assert shares.min() > 300 and shares.max() < 500  # 400 each, three and more deviations away
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.06
    with pytest.raises(IndexError):
        permuted(length, length, "")
