"""Memory of items: put into rows, looked at by number, kept in a cache."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sightline.core.layout import Layout, causal_layout
from sightline.core.memory import Memory, arrange, side_by_side

# row 0 holds two documents of one and two items, row 1 none, row 2 one item
OWNERS = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 1, 2], [2, 0, 1]])
LENGTHS = [2, 1, 3, 2]


def layout(document: list[list[int]], item: list[list[int]]) -> Layout:
    plain = causal_layout(len(item), len(item[0]))
    return replace(plain, document=torch.tensor(document), item=torch.tensor(item), causal=False)


def made(latest: bool = True) -> tuple[Tensor, Memory]:
    values = torch.arange(8.0)[:, None].repeat(1, 3)
    return values, arrange(values, LENGTHS, OWNERS, batch=3, latest=latest)


def test_every_vector_lies_in_its_row_in_order() -> None:
    _, memory = made()
    assert memory.document.tolist() == [[0, 0, 1, 1, 1, 1], [-1] * 6, [0, 0, -1, -1, -1, -1]]
    assert memory.item.tolist() == [[1, 1, 1, 2, 2, 2], [0] * 6, [1, 1, 0, 0, 0, 0]]
    assert memory.values is not None and memory.values[..., 0].tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0] * 6,
        [6, 7, 0, 0, 0, 0],
    ]


def test_gradients_go_back_to_the_vectors() -> None:
    values = torch.randn(8, 3, requires_grad=True)
    weight = torch.randn(3, 6, 3)
    memory = arrange(values, LENGTHS, OWNERS, batch=3, latest=True)
    assert memory.values is not None
    (memory.values * weight).sum().backward()
    assert (
        values.grad is not None
        and torch.equal(values.grad[:6], weight[0])
        and torch.equal(values.grad[6:], weight[2, :2])
    )


@pytest.mark.parametrize("latest", [True, False])
def test_who_looks_at_what(latest: bool) -> None:
    _, memory = made(latest)
    told = layout(
        [[0, 0, 1, 1, 1, -1], [0] * 6, [-1, 0, 0, 0, 0, 0]], [[0, 1, 0, 1, 2, 0], [0] * 6, [0, 0, 1, 1, 1, 1]]
    )
    looks = memory.looks(told)
    wanted = torch.zeros(3, 6, 6, dtype=torch.bool)
    wanted[0, 1, :2] = wanted[0, 3, 2] = wanted[0, 4, 3:] = wanted[2, 2:, :2] = True
    wanted[0, 4, 2] = not latest
    assert torch.equal(looks, wanted)


def test_what_a_caller_said_is_kept_for_what_follows() -> None:
    _, memory = made()
    seen = torch.rand(3, 4, 6) > 0.5
    told = layout([[0, 0, 0, -1], [0, 0, 0, 0], [-1, 0, 0, 0]], [[0] * 4] * 3)
    said = replace(memory, seen=seen)
    assert torch.equal(said.looks(told), seen)
    kept = said.kept(told)
    assert kept.values is None and kept.seen is not None
    last = torch.stack([seen[0, 2], seen[1, 3], seen[2, 3]])
    assert torch.equal(kept.seen[:, 0], last)
    assert torch.equal(kept.kept(told.span(0, 1)).looks(told.span(0, 2)), last[:, None].expand(-1, 2, -1))
    with pytest.raises(ValueError, match="further items"):
        kept.then(memory)
    with pytest.raises(ValueError, match="cannot be cut"):
        kept.until(told)


def test_further_items_follow_and_rows_are_chosen() -> None:
    values, memory = made()
    more = arrange(values[:1], [1], torch.tensor([[1, 0, 1]]), batch=3, latest=True)
    both = memory.kept(causal_layout(3, 1)).then(more)
    assert both.document.tolist()[1] == [-1] * 6 + [0] and both.values is more.values
    rows = memory.rows(torch.tensor([2, 2, 0]))
    assert rows.values is not None and rows.item.tolist() == [memory.item[i].tolist() for i in (2, 2, 0)]


def test_items_that_have_not_begun_are_hidden_for_good() -> None:
    _, memory = made(latest=False)
    early = layout([[0, 0], [0, 0], [0, 0]], [[0, 1], [0, 0], [0, 0]])
    cut = memory.until(early)
    assert cut.document.tolist() == [[0, 0, 1, -1, -1, -1], [-1] * 6, [-1] * 6]


def test_items_side_by_side_are_looked_at_together() -> None:
    """Row 0: two side by side, words, one more; row 1 begins with one right where row 0 ended."""
    slots = torch.tensor([1, 2, 5, 6])  # rows of six tokens
    owners = torch.tensor([[0, 0, 1], [0, 0, 2], [0, 0, 3], [1, 0, 1]])
    ends = side_by_side(slots, owners)
    assert ends.tolist() == [2, 2, 3, 1]
    memory = arrange(torch.randn(5, 3), [1, 2, 1, 1], owners, batch=2, latest=True, ends=ends)
    told = layout([[0] * 6, [0] * 6], [[0, 1, 2, 2, 2, 3], [1] * 6])
    looks = memory.looks(told)
    assert looks[0].int().tolist() == [[0] * 4, [1, 0, 0, 0], *[[1, 1, 1, 0]] * 3, [0, 0, 0, 1]]
    assert looks[1].int().tolist() == [[1, 0, 0, 0]] * 6
    swapped = memory.rows(torch.tensor([1, 0])).looks(told.rows(torch.tensor([1, 0])))
    assert torch.equal(swapped, looks[[1, 0]])
    later = arrange(torch.randn(1, 3), [1], torch.tensor([[0, 0, 4]]), batch=2, latest=True, ends=torch.tensor([4]))
    both = memory.then(later)
    assert both.looks(layout([[0], [0]], [[4], [1]])).int().tolist() == [[[0, 0, 0, 0, 1]], [[1, 0, 0, 0, 0]]]
    cut = memory.until(told.span(0, 2))  # after the first of two, which what follows no longer joins
    assert cut.looks(layout([[0, 0], [0, 0]], [[1, 2], [1, 1]]))[0].int().tolist() == [[1, 0, 0, 0], [0] * 4]
    assert len(side_by_side(slots[:0], owners[:0])) == 0
