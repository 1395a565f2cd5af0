"""Layouts: the one rule for who sees whom, and columns that are cut, joined and continued together."""

from dataclasses import replace

import pytest
import torch

from sightline.core.layout import COLUMNS, Axes, Layout, Medium, causal_layout, framed, visible


def layout(**columns: list[list[int]]) -> Layout:
    """A layout of the columns that matter to a test: one document, causal blocks, text, the trunk."""
    length = len(next(iter(columns.values()))[0])
    rows = len(next(iter(columns.values())))
    counted = [list(range(length))] * rows
    zero = [[0] * length] * rows
    default = {"document": zero, "block": counted, "position": counted, "medium": zero, "item": zero, "branch": zero}
    return Layout(**{name: torch.tensor(values) for name, values in (default | columns).items()})


def seen(of: Layout) -> list[list[list[int]]]:
    return visible(of, of).int().tolist()


@pytest.mark.parametrize(
    "columns, wanted",
    [
        ({"block": [[0, 1, 2]]}, ["100", "110", "111"]),  # causal
        ({"block": [[0, 0, 1, 2]]}, ["1100", "1100", "1110", "1111"]),  # prefix
        ({"block": [[0, 1, 1, 2]]}, ["1000", "1110", "1110", "1111"]),  # an image that sees itself whole
        ({"document": [[0, 0, 1, 1]], "block": [[0, 1, 0, 1]]}, ["1000", "1100", "0010", "0011"]),  # packing
        ({"document": [[0, 0, -1, -1]], "block": [[0, 1, 0, 0]]}, ["1000", "1100", "0000", "0000"]),  # right padding
        ({"document": [[-1, -1, 0, 0]], "block": [[0, 0, 0, 1]]}, ["0000", "0000", "0010", "0011"]),  # left padding
        # a trunk of two tokens that two branches go on from, neither of which sees the other
        (
            {"block": [[0, 1, 2, 3, 2, 3]], "branch": [[0, 0, 1, 1, 2, 2]]},
            ["100000", "110000", "111000", "111100", "110010", "110011"],
        ),
        # the trunk sees no branch, though a branch's block may begin before the trunk's own
        ({"block": [[0, 2, 1]], "branch": [[0, 0, 1]]}, ["100", "110", "101"]),
    ],
    ids=["causal", "prefix", "image-whole", "packing", "padding-right", "padding-left", "branches", "trunk"],
)
def test_who_sees_whom(columns: dict[str, list[list[int]]], wanted: list[str]) -> None:
    assert ["".join(map(str, row)) for row in seen(layout(**columns))[0]] == wanted


def test_each_row_of_a_batch_has_its_own_rule() -> None:
    both = layout(document=[[0, 0], [0, -1]], block=[[0, 1], [0, 0]])
    assert seen(both) == [[[1, 0], [1, 1]], [[1, 0], [0, 0]]]


def test_queries_and_keys_may_differ_in_length() -> None:
    whole = causal_layout(2, 5)
    assert torch.equal(visible(whole.span(3, 5), whole), visible(whole, whole)[:, 3:])


def test_causal_layout_is_a_triangle() -> None:
    plain = causal_layout(2, 4)
    assert plain.causal and (plain.batch, plain.length) == (2, 4)
    assert torch.equal(visible(plain, plain), torch.ones(2, 4, 4).tril().bool())


def test_span_and_then_are_inverse() -> None:
    whole = layout(block=[[0, 0, 1, 2]], item=[[0, 1, 1, 1]], medium=[[0, 1, 0, 0]])
    again = whole.span(0, 3).then(whole.span(3, 4))
    assert all(torch.equal(getattr(again, name), getattr(whole, name)) for name in COLUMNS)


def test_only_causal_parts_join_to_a_causal_whole() -> None:
    causal, other = causal_layout(1, 2), layout(block=[[0, 0]])
    joined = [a.then(b).causal for a in (causal, other) for b in (causal, other)]
    assert joined == [True, False, False, False]


def test_rows_come_in_the_order_asked_for() -> None:
    three = layout(document=[[0, 0], [1, 1], [2, 2]], item=[[5, 5], [6, 6], [7, 7]])
    picked = three.rows(torch.tensor([2, 0, 2]))
    assert picked.document.tolist() == [[2, 2], [0, 0], [2, 2]] and picked.item.tolist() == [[7, 7], [5, 5], [7, 7]]


def test_moving_keeps_every_column_and_the_promise() -> None:
    moved = causal_layout(1, 3).to("meta")
    assert {getattr(moved, name).device.type for name in COLUMNS} == {"meta"} and moved.causal


def test_next_goes_on_from_the_last_real_token() -> None:
    rows = layout(
        document=[[3, 3, 3], [4, 4, -1], [-1, -1, 5]],
        block=[[0, 0, 1], [0, 1, 9], [9, 9, 0]],
        position=[[0, 1, 2], [0, 1, 9], [9, 9, 0]],
        item=[[0, 1, 2], [1, 1, 0], [7, 7, 1]],
        branch=[[0, 0, 1], [0, 0, 0], [2, 2, 0]],
        medium=[[0, 1, 1], [0, 0, 0], [0, 0, 0]],
    )
    following = rows.next()
    assert following.document.tolist() == [[3], [4], [5]]
    assert following.block.tolist() == [[2], [2], [1]]
    assert following.position.tolist() == [[3], [2], [1]]
    assert following.item.tolist() == [[2], [1], [1]]
    assert following.branch.tolist() == [[1], [0], [0]]
    assert following.medium.tolist() == [[Medium.TEXT]] * 3


def test_next_counts_past_the_largest_position_not_the_length() -> None:
    image_shares_positions = layout(position=[[0, 1, 1, 1, 1, 2]])
    assert image_shares_positions.next().position.tolist() == [[3]]


def test_next_in_three_dimensions_is_past_the_largest_of_all() -> None:
    zero = torch.zeros(1, 3, dtype=torch.int64)
    position = torch.tensor([[[0, 0, 0], [1, 1, 5], [1, 2, 1]]])
    following = Layout(zero, torch.arange(3)[None], position, zero, zero, zero).next()
    assert following.position.tolist() == [[[6, 6, 6]]]
    padded = Layout(torch.tensor([[0, 0, -1]]), zero, position.flip(1), zero, zero, zero).next()
    assert padded.position.tolist() == [[[6, 6, 6]]]


def test_next_keeps_the_promise_of_causal() -> None:
    assert causal_layout(1, 3).next().causal and not layout(block=[[0, 1]]).next().causal
    grown = causal_layout(2, 3)
    grown = grown.then(grown.next())
    assert torch.equal(visible(grown, grown), torch.ones(2, 4, 4).tril().bool())


def test_a_frame_around_each_picture() -> None:
    """Before the patches, all patches, after them: three positions a picture; what ends it is read as text."""
    slots = torch.tensor([1, 2, 3, 4, 5, 8, 9, 10])  # five and three
    still, last = framed(slots, [5, 3])
    assert still.tolist() == [3, 4] and last.tolist() == [5, 10]


def test_places_on_three_axes() -> None:
    """Words, a picture of 4x6 patches in squares of two, a word, a film of two steps, words."""
    places = Axes(fold=2).positions(13, [(2, (1, 4, 6), 9.0), (9, (2, 2, 2), 9.0)])
    words = [[0] * 3, [1] * 3]
    image = [[2, 2 + row, 2 + column] for row in range(2) for column in range(3)]
    assert places.tolist() == [*words, *image, [5] * 3, [6, 6, 6], [7, 6, 6], [8] * 3, [9] * 3]
    assert Axes().positions(3, []).tolist() == [[0] * 3, [1] * 3, [2] * 3]


def test_time_may_be_counted_in_seconds() -> None:
    places = Axes(fold=1, per_second=2).positions(5, [(1, (3, 1, 1), 0.75)])
    assert places[:, 0].tolist() == [0, 1, 2, 4, 5]  # one and a half cut to one
    assert places[:, 1].tolist() == [0, 1, 1, 1, 5]


def test_a_layout_on_three_axes_goes_on_after_the_largest_place() -> None:
    made = replace(causal_layout(1, 5), position=Axes().positions(5, [(1, (1, 1, 4), 1.0)])[None])
    assert made.next().position.tolist() == [[[5, 5, 5]]]
    assert made.then(made.next()).position.shape == (1, 6, 3)
