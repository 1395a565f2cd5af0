"""Who sees whom while a Q-Former learns: three ways of reading, each held to its mask by what changes what."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.fusion.qformer import QFormer, QFormerConfig
from sightline.fusion.qformer_text import QFormerText

SIZES: Any = {"inputs": 6, "width": 8, "queries": 3, "hidden": 8, "depth": 3, "heads": 2, "mlp": 12}
FEATURES = torch.linspace(-1, 1, 24).reshape(1, 4, 6)
IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture(scope="module")
def parts() -> tuple[QFormer, QFormerText]:
    torch.manual_seed(0)
    qformer = QFormer(QFormerConfig(**SIZES))
    text = QFormerText(qformer.config, 10, 7)
    with torch.no_grad():
        for parameter in (*qformer.parameters(), *text.parameters()):
            parameter.normal_(std=1.0)
    return qformer.requires_grad_(False), text.requires_grad_(False)


def changed(place: int) -> Tensor:
    """The ids with another word at a place."""
    other = IDS.clone()
    other[0, place] = 9
    return other


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-6)


def test_words_alone_see_one_another_and_no_padding(parts: tuple[QFormer, QFormerText]) -> None:
    qformer, text = parts
    found = text.alone(qformer, IDS)
    assert found.shape == (1, 4, 8)
    for place in range(4):
        other = text.alone(qformer, changed(place))
        assert all(not same(other[:, i], found[:, i]) for i in range(4))
    torch.testing.assert_close(text.alone(qformer, torch.tensor([[3, 4, 5, 6, -1, -1]]))[:, :4], found)


def test_queries_that_look_for_a_caption_see_all_of_it(parts: tuple[QFormer, QFormerText]) -> None:
    qformer, text = parts
    found = text.together(qformer, FEATURES, IDS)
    assert found.shape == (1, 3, 8)
    for place in range(4):
        assert not same(text.together(qformer, FEATURES, changed(place)), found)
    assert not same(text.together(qformer, -FEATURES, IDS), found)
    torch.testing.assert_close(text.together(qformer, FEATURES, torch.tensor([[3, 4, 5, 6, -1]])), found)


def test_what_is_told_is_seen_by_later_words_only(parts: tuple[QFormer, QFormerText]) -> None:
    qformer, text = parts
    queries, words = text.told(qformer, FEATURES, IDS)
    torch.testing.assert_close(queries, qformer.ask(FEATURES, None))  # as if there were no words
    for place in range(4):
        other, then = text.told(qformer, FEATURES, changed(place))
        assert torch.equal(other, queries)
        assert same(then[:, :place], words[:, :place])
        assert all(not same(then[:, i], words[:, i]) for i in range(place, 4))
    _, elsewhere = text.told(qformer, -FEATURES, IDS)
    assert all(not same(elsewhere[:, i], words[:, i]) for i in range(4))
    torch.testing.assert_close(text.told(qformer, FEATURES, torch.tensor([[3, 4, 5, 6, -1]]))[1][:, :4], words)


def test_the_q_former_is_the_same_without_it(parts: tuple[QFormer, QFormerText]) -> None:
    qformer, text = parts
    assert not any("words" in name or "positions" in name for name in qformer.state_dict())
    reads = QFormer(QFormerConfig(**SIZES, vocab_size=10, max_length=7))
    both = {**qformer.state_dict(), **text.state_dict()}
    reads.load_state_dict(both)  # what is one model's for an instruction is here in two parts, by the same names
    torch.testing.assert_close(reads.ask(FEATURES, IDS), text.together(qformer, FEATURES, IDS))
