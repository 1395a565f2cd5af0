"""Experts against a loop over tokens, and what is counted of them."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sightline.core.errors import ConfigError
from sightline.layers.experts import Experts, ExpertsConfig
from sightline.layers.packed import pack
from sightline.zoo.hollow import Operations, hollow

SETTINGS = [
    ExpertsConfig(5, 2, 12),
    ExpertsConfig(4, 1, 12, shared=20),
    ExpertsConfig(4, 1, 12, shared=20, routing="sigmoid"),
    ExpertsConfig(3, 3, 12, routing="sigmoid"),
]


def one_by_one(layer: Experts, x: Tensor) -> Tensor:
    """Each token by itself through the experts that its scores name."""
    cfg, rows = layer.config, []
    for token in x.flatten(0, 1):
        scores = layer.router(token)
        best = scores.argsort(descending=True)[: cfg.chosen]
        shares = torch.softmax(scores, 0)[best]
        shares = shares / shares.sum()
        if cfg.routing == "softmax":
            out = sum(share * layer.experts[int(e)](token[None])[0] for share, e in zip(shares, best, strict=True))
        else:
            out = sum(layer.experts[int(e)](torch.sigmoid(scores[e]) * token[None])[0] for e in best)
        rows.append(out if layer.shared is None else out + layer.shared(token[None])[0])
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("cfg", SETTINGS)
@pytest.mark.parametrize("shape", [(2, 9, 8), (1, 1, 8)])
def test_tokens_sorted_by_expert_are_tokens_one_by_one(cfg: ExpertsConfig, shape: tuple[int, int, int]) -> None:
    layer, x = Experts(8, cfg, "silu"), torch.randn(shape, requires_grad=True)
    found, wanted = layer(x), one_by_one(layer, x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    toward = torch.randn(shape)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    given = [
        torch.autograd.grad(out, (x, *parameters), toward, retain_graph=True, allow_unused=True)
        for out in (found, wanted)
    ]
    for name, a, b in zip(("x", *names), *given, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(*(zero if g is None else g.sum() for g in (a, b)), atol=1e-4, rtol=1e-4, msg=name)


def test_an_expert_is_called_once_at_most_however_many_tokens() -> None:
    layer, calls = Experts(8, ExpertsConfig(4, 2, 12), "silu"), []
    for n, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda m, given, out, n=n: calls.append((n, len(given[0]))))
    layer(torch.randn(3, 50, 8))
    assert len({n for n, _ in calls}) == len(calls) <= 4
    assert sum(tokens for _, tokens in calls) == 3 * 50 * 2


def test_no_tokens_at_all() -> None:
    layer = Experts(8, ExpertsConfig(4, 2, 12), "silu")
    assert layer(torch.zeros(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("cfg", SETTINGS)
def test_operations_are_those_that_are_done(cfg: ExpertsConfig) -> None:
    """Counted on the meta device, where no router can choose; torch counts them on real numbers."""
    x = torch.randn(2, 7, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as real:
        Experts(8, cfg, "silu")(x)
    with hollow():
        layer = Experts(8, cfg, "silu")
    with torch.no_grad(), Operations() as told:
        layer(x.to("meta"))
    assert told.count == real.get_total_flops()


def test_packed_they_compute_the_same() -> None:
    layer, x = Experts(32, ExpertsConfig(5, 2, 48, shared=48), "silu"), torch.randn(2, 9, 32)
    with torch.inference_mode():
        wanted = layer(x)
        pack(layer)
        torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(4, 5, 8), (4, 0, 8), (4, 2, 0)])
def test_sizes_that_make_no_sense_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="experts"):
        ExpertsConfig(*sizes)
