"""Kosmos-2's cells against transformers: boxes to cells, and whole answers to entities, over many random boxes."""

import random
import re

import pytest
from transformers.models.kosmos2.processing_kosmos2 import (
    clean_text_and_extract_entities_with_bboxes,
    coordinate_to_patch_index,
)

from sightline.core.geometry import Box, Frame, Transform
from sightline.core.sequence import Piece
from sightline.grounding.codecs import Kosmos2Patches

CODEC = Kosmos2Patches()
FRAME = Frame(1, 1)
WAY = Transform(FRAME)
WORDS = ["a snowman", " the fire ", "two of them", "it"]


def pieces(text: str) -> list[Piece]:
    found = re.split(r"(<[/\w]+>)", text)
    return [Piece(word, control=i % 2 == 1) for i, word in enumerate(found) if word]


def test_cells_of_random_boxes() -> None:
    rng = random.Random(0)
    for i in range(3000):
        grid = 32 if i % 3 else 2**20  # a third of the edges lie anywhere, the others on lines between cells
        (x1, x2), (y1, y2) = (sorted(rng.sample(range(grid + 1), 2)) for _ in range(2))
        shares = (x1 / grid, y1 / grid, x2 / grid, y2 / grid)
        first, last = coordinate_to_patch_index(shares, 32)
        wanted = f"<object><patch_index_{first:04d}><patch_index_{last:04d}></object>"
        assert CODEC.encode([Box(*shares, FRAME)], WAY) == wanted


def test_answers_of_random_cells() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "<grounding> An image"
        for _ in range(rng.randint(0, 4)):
            near = rng.random() < 0.5  # so that cells often share a row or a column
            starts = [rng.randrange(1024) for _ in range(rng.randint(1, 3))]
            ends = [min(1023, k + rng.choice([0, 1, 32, 33, 64])) if near else rng.randrange(1024) for k in starts]
            cells = [f"<patch_index_{a:04d}><patch_index_{b:04d}>" for a, b in zip(starts, ends, strict=True)]
            phrase = f"<phrase>{rng.choice(WORDS)}</phrase>" if rng.random() < 0.7 else " and"
            text += f"{phrase}<object>{'</delimiter_of_multi_objects/>'.join(cells)}</object> of"
        words, entities = clean_text_and_extract_entities_with_bboxes(text)
        found = CODEC.decode(pieces(text), WAY)
        wanted = [("" if name.startswith("<patch") else name, box) for name, _, boxes in entities for box in boxes]
        assert found.text == words and [box.label for box in found.boxes] == [name for name, _ in wanted]
        for box, (_, (x1, y1, x2, y2)) in zip(found.boxes, wanted, strict=True):
            assert box.xyxy == pytest.approx((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), abs=1e-12)
