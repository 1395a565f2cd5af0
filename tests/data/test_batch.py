"""Examples to batches: padded on either side, packed into rows, or joined as branches of one trunk."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sightline.core.layout import Medium, visible
from sightline.core.patches import Tiling, patchify
from sightline.data.batch import IGNORE, Batch, Example, branched, collate, pack

PAD = 99


def example(ids: list[int], slots: tuple[int, ...] = (), learned: int = 1, **changes: Any) -> Example:
    """A causal example whose last `learned` tokens are the answer; images are 4 x 8, of two patches."""
    length = len(ids)
    tokens = torch.tensor(ids)
    medium, item = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.int64)
    medium[list(slots)] = Medium.IMAGE
    for first in slots[::2]:
        item[first:] += 1
    labels = torch.full((length,), IGNORE)
    labels[-learned - 1 : -1] = tokens[-learned:]
    built = Example(
        ids=tokens,
        block=torch.arange(length),
        position=torch.arange(length),
        medium=medium,
        item=item,
        branch=torch.zeros(length, dtype=torch.int64),
        labels=labels,
        slots=torch.tensor(slots, dtype=torch.int64),
        pixels=tuple(torch.full((3, 4, 8), float(slot)) for slot in slots[::2]),
        extra={"first": ids[0]},
    )
    return replace(built, **changes)


LONG, SHORT = example([1, 2, 3, 4, 5], slots=(1, 2)), example([6, 7, 8])


def test_padding_on_the_right() -> None:
    batch = collate([LONG, SHORT], 4, PAD)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, PAD, PAD]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[IGNORE, IGNORE, IGNORE, 5, IGNORE], [IGNORE, 8, IGNORE, IGNORE, IGNORE]]
    assert batch.layout.document.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, -1, -1]]
    assert batch.layout.position.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert batch.layout.item.tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert batch.layout.causal


def test_padding_on_the_left() -> None:
    batch = collate([SHORT, LONG], 4, PAD, side="left")
    assert batch.ids.tolist() == [[PAD, PAD, 6, 7, 8], [1, 2, 3, 4, 5]]
    assert batch.layout.document.tolist() == [[-1, -1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert batch.layout.position.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch.slots.tolist() == [5 + 1, 5 + 2]
    assert not batch.layout.causal


def test_slots_point_at_the_image_tokens_of_their_row() -> None:
    for side in ("left", "right"):
        batch = collate([SHORT, LONG, example([9, 9, 9, 9], slots=(0, 1, 2, 3))], 4, PAD, side=side)
        assert batch.layout.medium.flatten().nonzero().flatten().tolist() == batch.slots.tolist()
        assert batch.patches is not None
        assert len(batch.patches.values) == len(batch.slots) and batch.patches.grids == ((1, 1, 2),) * 3
        assert torch.equal(batch.patches.values[:2], patchify(LONG.pixels[0][None], 4).values)
        assert batch.patches.values[:, 0].tolist() == [1, 1, 0, 0, 2, 2]  # in the order of the slots


@pytest.mark.parametrize("multiple, length", [(1, 5), (4, 8), (5, 5), (64, 64)])
def test_rows_are_padded_to_a_multiple(multiple: int, length: int) -> None:
    batch = collate([LONG, SHORT], 4, PAD, multiple=multiple)
    assert batch.ids.shape == (2, length)
    assert (batch.ids[0, 5:] == PAD).all() and (batch.layout.document[0, 5:] == -1).all()


def test_equal_lengths_on_the_left_stay_causal() -> None:
    assert collate([SHORT, SHORT], 4, PAD, side="left").layout.causal
    assert not collate([SHORT, SHORT], 4, PAD, side="left", multiple=4).layout.causal


def test_one_example_that_is_not_causal_makes_the_batch_not_causal() -> None:
    assert not collate([LONG, replace(SHORT, causal=False)], 4, PAD).layout.causal


def test_without_pictures_there_are_no_patches() -> None:
    batch = collate([SHORT], 4, PAD)
    assert batch.patches is None and batch.slots.tolist() == []


def test_padding_changes_nothing_of_what_real_tokens_see() -> None:
    for side, offset in (("right", 0), ("left", 2)):
        batch = collate([LONG, SHORT], 4, PAD, side=side)
        seen = visible(batch.layout, batch.layout)[1]
        real = slice(offset, offset + 3)
        assert torch.equal(seen[real, real], torch.ones(3, 3).tril().bool())
        assert seen.sum() == 6  # nothing sees padding, and padding sees nothing


def test_packing_puts_the_longest_first_where_there_is_room() -> None:
    examples = [
        example(list(range(start, start + length))) for start, length in ((10, 2), (20, 5), (30, 3), (40, 3), (50, 2))
    ]
    batch = pack(examples, 4, PAD, length=8)
    assert batch.ids.tolist() == [[20, 21, 22, 23, 24, 30, 31, 32], [40, 41, 42, 10, 11, 50, 51, PAD]]
    assert batch.layout.document.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 2, 2, -1]]
    assert batch.layout.position[1].tolist() == [0, 1, 2, 0, 1, 0, 1, 0]
    assert batch.extra["examples"] == [[{"first": 20}, {"first": 30}], [{"first": 40}, {"first": 10}, {"first": 50}]]
    assert not batch.layout.causal


def test_packed_examples_do_not_see_one_another() -> None:
    batch = pack([LONG, SHORT], 4, PAD, length=9)
    wanted = torch.block_diag(torch.ones(5, 5).tril(), torch.ones(3, 3).tril(), torch.zeros(1, 1)).bool()
    assert torch.equal(visible(batch.layout, batch.layout)[0], wanted)


def test_packed_slots_and_labels_stay_with_their_example() -> None:
    batch = pack([SHORT, LONG, example([7, 7, 7, 7], slots=(0, 1))], 4, PAD, length=9)
    assert batch.slots.tolist() == batch.layout.medium.flatten().nonzero().flatten().tolist() == [1, 2, 5, 6]
    assert batch.labels is not None
    assert batch.labels[0, 8] == IGNORE and batch.labels[0, :5].tolist() == LONG.labels.tolist()
    assert batch.labels[1, :3].tolist() == SHORT.labels.tolist()


def test_rows_of_a_single_causal_example_stay_causal() -> None:
    assert pack([LONG, SHORT], 4, PAD, length=5).layout.causal


def test_an_example_longer_than_its_row_is_told() -> None:
    with pytest.raises(ValueError, match="an example of 5 tokens does not fit rows of 4"):
        pack([SHORT, LONG], 4, PAD, length=4)


def test_branches_share_their_trunk_and_go_on_from_its_positions() -> None:
    first, second = example([1, 2, 3, 4, 5], slots=(1, 2)), example([1, 2, 3, 6, 7, 8], slots=(1, 2), learned=2)
    joined = branched([first, second])
    assert joined.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert joined.branch.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert joined.position.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert joined.labels.tolist() == [IGNORE, IGNORE, IGNORE, 5, IGNORE, 7, 8, IGNORE]
    assert joined.slots.tolist() == [1, 2] and len(joined.pixels) == 1 and not joined.causal


def test_each_branch_sees_what_it_would_see_alone() -> None:
    first, second = example([1, 2, 3, 4, 5]), example([1, 2, 6, 7, 8, 9])
    together = collate([branched([first, second])], 4, PAD).layout
    seen = visible(together, together)[0]
    for columns in ([0, 1, 2, 3, 4], [0, 1, 5, 6, 7, 8]):
        assert torch.equal(seen[columns][:, columns], torch.ones(len(columns), len(columns)).tril().bool())
    assert not seen[2:5, 5:].any() and not seen[5:, 2:5].any()


def test_answers_that_begin_alike_do_not_join_the_trunk() -> None:
    """What is learned belongs to each branch: in the trunk, one answer's tokens would count once for both."""
    same = branched([example([1, 2, 8, 8], learned=2), example([1, 2, 8, 9], learned=2)])
    assert same.ids.tolist() == [1, 2, 8, 8, 2, 8, 9]
    assert (same.labels != IGNORE).sum() == 4


def test_a_single_continuation_is_itself() -> None:
    assert branched([LONG]) is LONG


def test_pictures_must_lie_in_the_trunk() -> None:
    with pytest.raises(ValueError, match="differ from token 2 on, before the end of their pictures"):
        branched([example([1, 2, 3, 4], slots=(1, 2)), example([1, 2, 5, 4], slots=(1, 2))])


def test_moving_a_batch_moves_all_of_it() -> None:
    batch = collate([LONG], 4, PAD).to("meta")
    assert isinstance(batch, Batch) and batch.patches is not None and batch.labels is not None
    tensors = (batch.ids, batch.labels, batch.slots, batch.patches.values, batch.layout.block)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    bare = replace(collate([SHORT], 4, PAD), labels=None).to("meta")
    assert bare.labels is None and bare.patches is None


def test_tilings_go_with_their_pictures() -> None:
    """Of a row of two examples, the longer first, and of rows one by one."""
    tiling, other = Tiling(1, 1, 8, 4), Tiling(2, 1, 4, 8)
    view = torch.zeros(3, 4, 8)
    short = example([6, 7, 8], slots=(1,), pixels=(view,) * 2, tilings=(tiling,))
    long = example([1, 2, 3, 4, 5], slots=(1,), pixels=(view,) * 3, tilings=(other,))
    rows, row = collate([short, long], 4, PAD), pack([short, long], 4, PAD, length=8)
    assert rows.patches is not None and row.patches is not None
    assert rows.patches.tilings == (tiling, other) and row.patches.tilings == (other, tiling)
    assert rows.to("meta").patches.tilings == (tiling, other)  # type: ignore[union-attr]
