"""How tokens are chosen: distributions counted, seeds repeated, settings refused."""

import math

import pytest
import torch
from torch import Tensor

from sightline import InputError, Sampling
from sightline.serving.sampling import Chooser, kept, sampling_of

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, -math.inf, 1.9])
P = LOGITS.double().softmax(-1)
DRAWS = 4000


def drawn(logits: Tensor, **settings: float) -> Tensor:
    """Shares of each token among many draws of one request."""
    choose = Chooser(Sampling(**settings))  # type: ignore[arg-type]
    return torch.bincount(torch.tensor([choose(logits)[0] for _ in range(DRAWS)]), minlength=len(logits)) / DRAWS


def near(found: Tensor, wanted: Tensor) -> bool:
    """Within five deviations of a share of so many draws; what cannot be drawn never is."""
    deviation = (wanted * (1 - wanted) / DRAWS).sqrt()
    return bool(((found - wanted).abs() <= 5 * deviation + 1e-12).all())


def test_greedy_is_the_likeliest_whatever_the_seed() -> None:
    assert {Chooser(Sampling(seed=seed))(LOGITS)[0] for seed in range(20)} == {1}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_flattens_or_sharpens(temperature: float) -> None:
    wanted = (LOGITS.double() / temperature).softmax(-1)
    assert near(drawn(LOGITS, temperature=temperature), wanted)
    assert temperature == 1.0 or not near(drawn(LOGITS, temperature=temperature), P)


def test_a_low_temperature_is_nearly_greedy() -> None:
    assert drawn(LOGITS, temperature=1e-3)[1] == 1.0


@pytest.mark.parametrize(("top_p", "tokens"), [(0.05, [1]), (0.5, [1, 5]), (0.85, [1, 3, 5]), (0.99, [0, 1, 2, 3, 5])])
def test_top_p_keeps_the_fewest_likeliest_that_reach_it(top_p: float, tokens: list[int]) -> None:
    inside = torch.zeros(len(P), dtype=torch.bool)
    inside[tokens] = True
    assert float(P[inside].sum()) >= top_p > float(P[inside].sum() - P[tokens].min())
    assert torch.equal(kept(P, top_p) > 0, inside)
    wanted = torch.where(inside, P, 0) / P[inside].sum()
    assert near(drawn(LOGITS, temperature=1.0, top_p=top_p), wanted)


def test_top_p_of_one_keeps_everything() -> None:
    assert torch.equal(kept(P, 1.0), P)


def test_among_equals_one_is_kept() -> None:
    assert int((kept(torch.full((4,), 0.25), 0.2) > 0).sum()) == 1


def test_temperature_comes_before_top_p() -> None:
    """At a high temperature more tokens are needed to reach the same share."""
    hot = (LOGITS.double() / 5).softmax(-1)
    assert int((kept(hot, 0.7) > 0).sum()) > int((kept(P, 0.7) > 0).sum())
    assert near(drawn(LOGITS, temperature=5.0, top_p=0.7), kept(hot, 0.7) / kept(hot, 0.7).sum())


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    def draws(seed: int) -> list[int]:
        choose = Chooser(Sampling(temperature=1.0, seed=seed))
        return [choose(LOGITS)[0] for _ in range(40)]

    assert draws(7) == draws(7)
    assert len({tuple(draws(seed)) for seed in (-1, 0, 1, 2, 2**31)}) == 5


def test_requests_do_not_share_a_generator() -> None:
    """Draws of others in between change nothing, torch's own among them."""
    alone, crowded = Chooser(Sampling(temperature=1.0)), Chooser(Sampling(temperature=1.0))
    other, found = Chooser(Sampling(temperature=1.0, seed=1)), []
    for _ in range(40):
        found.append(crowded(LOGITS)[0])
        other(LOGITS)
        torch.rand(1)
    assert found == [alone(LOGITS)[0] for _ in range(40)]


@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0, "top_p": 0.9, "seed": 4}])
def test_the_probability_told_is_the_model_s_own(settings: dict[str, float]) -> None:
    """At temperature 1, whatever temperature was drawn with."""
    index, sure = Chooser(Sampling(**settings))(LOGITS)  # type: ignore[arg-type]
    assert sure == pytest.approx(float(P[index]), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of at least 1"),
        ({"temperature": -0.1}, r"temperature is -0.1, expected 0 \(greedy\) to 100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"stop": ("x", "")}, "a stop text is empty"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "x"}, "temperature is 'x', expected 0"),
        ({"temperature": None}, "temperature is None, expected 0"),
        ({"top_p": "1"}, "top_p is '1', expected above 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected a whole number of at least 1"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3', expected a whole number"),
        ({"seed": "red"}, "seed is 'red', expected a whole number"),
        ({"stop": 3}, "stop is 3, expected a list of texts"),
        ({"stop": "end"}, "stop is 'end', expected a list of texts"),
        ({"temprature": 1.0}, "unknown setting 'temprature'; did you mean 'temperature'?"),
    ],
)
def test_settings_of_the_wrong_type_are_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        sampling_of(settings)
    assert str(caught.value).startswith(message)
