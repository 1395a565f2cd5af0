"""Scenes: pure functions of their seed whose drawn pixels agree with what they say of themselves."""

import random
import re
import time
from collections import Counter

import numpy as np
import pytest

from sightline.core.errors import ConfigError
from sightline.worlds import COLORS, SHAPES, SIZES, TEXTURES, Object, Scene, SceneConfig, questions, scene
from sightline.worlds.scene_drawing import PALETTE, STYLES, stamp
from sightline.worlds.words import NUMBERS

LINE_STYLES = ("flat", "bordered", "shaded", "sketchy")  # those that do not touch the whole picture afterwards
PLAIN = SceneConfig(overlap=0, textures=("solid",), styles=("flat",), backgrounds=("plain",))


def changed(drawn: Scene) -> np.ndarray:
    """Where the picture of a scene on a plain background differs from that background."""
    away = np.asarray(drawn.picture()).astype(int) - np.array(drawn.background.first)
    return np.abs(away).max(-1) > 24


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Pixels [n, 2] of each piece whose pixels touch along edges, by flood fill."""
    left, pieces = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        stack, piece = [left.pop()], []
        while stack:
            y, x = stack.pop()
            piece.append((y, x))
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            stack.extend(near)
        pieces.append(np.array(piece))
    return pieces


def test_a_scene_is_a_pure_function_of_its_seed() -> None:
    for seed in range(40):
        stamp.cache_clear()
        first = scene(seed), scene(seed).picture().tobytes()
        random.seed(seed)
        np.random.seed(seed)
        for other in range(5):
            scene(1000 + other).picture()
        assert (scene(seed), scene(seed).picture().tobytes()) == first
    assert len({scene(seed) for seed in range(300)}) == 300


def test_nothing_draws_from_the_global_generators() -> None:
    random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    for seed in range(20):
        drawn = scene(seed)
        drawn.picture()
        drawn.caption(random.Random(seed))
        questions(drawn, random.Random(seed), 12)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def touching(drawn: Scene) -> bool:
    """Whether two objects are so near that their soft edges meet."""
    boxes = [each.box for each in drawn.objects]
    return any(
        a is not b and a[0] <= b[2] + 1 and b[0] <= a[2] + 1 and a[1] <= b[3] + 1 and b[1] <= a[3] + 1
        for a in boxes
        for b in boxes
    )


def test_every_object_is_where_its_pixels_are_and_has_their_color() -> None:
    names, inks = list(PALETTE), np.array(list(PALETTE.values()))
    scenes = [drawn for seed in range(220) if not touching(drawn := scene(seed, PLAIN))]
    assert len(scenes) > 120
    for drawn in scenes:
        pixels = np.asarray(drawn.picture())
        pieces = [piece for piece in components(changed(drawn)) if len(piece) > 8]
        assert len(pieces) == len(drawn.objects)
        left = list(drawn.objects)
        for piece in pieces:
            y1, x1 = piece.min(0)
            y2, x2 = piece.max(0) + 1
            each = min(left, key=lambda one: np.abs(np.subtract(one.box, (x1, y1, x2, y2))).sum())
            left.remove(each)
            assert np.abs(np.subtract(each.box, (x1, y1, x2, y2))).max() <= 1
            ink = np.median(pixels[piece[:, 0], piece[:, 1]], axis=0)
            assert names[np.linalg.norm(inks - ink, axis=1).argmin()] == each.color
            side = max(x2 - x1, y2 - y1)
            assert each.size == ("small" if side < 26 else "large")


def test_boxes_hold_for_every_style_texture_and_canvas() -> None:
    """Drawn once with and once without its last object, a picture changes exactly within that object's box."""
    seen = set()
    for seed in range(120):
        width, height = ((128, 128), (160, 120), (96, 200), (224, 224))[seed % 4]
        drawn = scene(seed, SceneConfig(width, height, overlap=0, styles=LINE_STYLES))
        without = Scene(drawn.seed, drawn.size, drawn.objects[:-1], drawn.background, drawn.style)
        away = np.asarray(drawn.picture()).astype(int) - np.asarray(without.picture())
        ys, xs = np.nonzero(np.abs(away).max(-1) > 16)
        box = drawn.objects[-1].box
        assert np.abs(np.subtract(box, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))).max() <= 1
        seen |= {drawn.style, drawn.objects[-1].texture}
    assert seen == {*LINE_STYLES, *TEXTURES}


def test_visible_parts_are_what_remains_in_drawing_order() -> None:
    covered = 0
    for seed in range(200):
        drawn = scene(seed, SceneConfig(overlap=1))
        layers = []
        for each in drawn.objects:
            layer = np.zeros((128, 128), bool)
            mask, (x, y) = each.stamp().covered, each.corner()
            layer[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
            layers.append(layer)
        for index, (each, layer) in enumerate(zip(drawn.objects, layers, strict=True)):
            above = np.any(layers[index + 1 :], axis=0) if layers[index + 1 :] else np.zeros_like(layer)
            assert each.visible == pytest.approx((layer & ~above).sum() / layer.sum())
            assert each.visible >= 0.65
            assert (drawn.owners() == index).sum() == (layer & ~above).sum()
            covered += each.visible < 1
    assert covered > 50


def test_alike_colors_never_run_together() -> None:
    for seed in range(200):
        things = scene(seed, SceneConfig(overlap=1)).objects
        for index, first in enumerate(things):
            for second in things[:index]:
                if first.color == second.color:
                    x = max(first.box[0] - second.box[2], second.box[0] - first.box[2])
                    y = max(first.box[1] - second.box[3], second.box[1] - first.box[3])
                    assert max(x, y) >= 3


def test_objects_stand_out_from_the_background_and_centers_apart() -> None:
    for seed in range(400):
        drawn = scene(seed)
        for each in drawn.objects:
            for ground in (drawn.background.first, drawn.background.second):
                assert np.linalg.norm(np.subtract(PALETTE[each.color], ground)) >= 85
        cells = {(int(each.center[0] // 16), int(each.center[1] // 16)) for each in drawn.objects}
        assert len(cells) == len(drawn.objects)


def test_colors_and_shapes_are_told_apart() -> None:
    inks = np.array(list(PALETTE.values()))
    gaps = np.linalg.norm(inks[:, None] - inks[None], axis=-1) + 1e9 * np.eye(len(inks))
    assert gaps.min() > 70
    assert len(COLORS) >= 10 and len(SHAPES) >= 8
    masks = {shape: stamp(shape, 16, "solid", 0, 0).covered for shape in SHAPES}
    for first in SHAPES:
        for second in SHAPES:
            if first < second:
                assert (masks[first] & masks[second]).sum() / (masks[first] | masks[second]).sum() < 0.85, (
                    first,
                    second,
                )


def test_the_world_is_varied() -> None:
    scenes = [scene(seed) for seed in range(1500)]
    things = [each for drawn in scenes for each in drawn.objects]
    for name, classes in (("color", COLORS), ("shape", SHAPES), ("size", SIZES)):
        shares = Counter(getattr(each, name) for each in things)
        assert set(shares) == set(classes)
        assert min(shares.values()) > 0.75 * len(things) / len(classes)
    assert {each.texture for each in things} == set(TEXTURES)
    assert {drawn.style for drawn in scenes} == set(STYLES)
    totals = Counter(len(drawn.objects) for drawn in scenes)
    assert set(totals) == set(range(1, 13)) and min(totals.values()) > 60
    groups = Counter(max(Counter(each.label for each in drawn.objects).values()) for drawn in scenes)
    assert min(groups[count] for count in range(1, 7)) > 40


def test_the_grid_says_what_the_objects_say() -> None:
    for seed in range(60):
        drawn = scene(seed, SceneConfig(160, 120) if seed % 2 else SceneConfig())
        width, height = drawn.size
        grid = drawn.grid(16)
        assert grid["object"].shape == (-(-height // 16), -(-width // 16))
        winners: dict[tuple[int, int], Object] = {}
        for each in drawn.objects:
            winners[int(each.center[1]) // 16, int(each.center[0]) // 16] = each
        assert {tuple(cell) for cell in np.argwhere(grid["object"]).tolist()} == set(winners)
        for cell, each in winners.items():
            assert COLORS[grid["color"][cell]] == each.color and SHAPES[grid["shape"][cell]] == each.shape
            assert SIZES[grid["size"][cell]] == each.size and TEXTURES[grid["texture"][cell]] == each.texture
            assert grid["box"][cell] * (width, height, width, height) == pytest.approx(each.box, abs=1e-3)
        empty = grid["object"] == 0
        assert (grid["color"][empty] == -1).all() and (grid["box"][empty] == 0).all()


def test_the_cover_of_the_grid_is_seen_in_the_picture() -> None:
    names, inks = list(PALETTE), np.array(list(PALETTE.values()))
    for seed in range(60):
        drawn = scene(seed, PLAIN)
        pixels, grid = np.asarray(drawn.picture()), drawn.grid(16)
        for row, column in np.ndindex(8, 8):
            here = pixels[row * 16 + 8, column * 16 + 8].astype(int)
            around = pixels[row * 16 + 7 : row * 16 + 10, column * 16 + 7 : column * 16 + 10].reshape(-1, 3)
            if np.ptp(around, axis=0).max() > 0:
                continue  # on an edge, where colours mix
            index = grid["cover"][row, column]
            assert (index == -1) == (tuple(here) == drawn.background.first)
            if index >= 0:
                assert names[np.linalg.norm(inks - here, axis=1).argmin()] == COLORS[grid["cover_color"][row, column]]
                assert SHAPES[grid["cover_shape"][row, column]] == drawn.objects[index].shape
            else:
                assert grid["cover_color"][row, column] == grid["cover_shape"][row, column] == -1


def test_captions_count_everything_exactly_once() -> None:
    word = re.compile(
        rf"\b(a|an|{'|'.join(NUMBERS[1:])}) ((?:(?:{'|'.join((*SIZES, *TEXTURES, *COLORS))}) )*)"
        rf"({'|'.join(SHAPES)}|thing|object|shape|item)(?:s|es)?\b"
    )
    wordings = set()
    for seed in range(300):
        drawn = scene(seed)
        caption = drawn.caption(random.Random(seed))
        head, _, body = caption.rpartition(":")
        wordings.add(word.sub("#", caption).split("#")[0])
        if head:
            (said,) = [match[1] for match in word.finditer(head) if match[3] not in SHAPES][-1:]
            assert {"a": 1, "an": 1}.get(said) or NUMBERS.index(said) == len(drawn.objects)
        told = 0
        for number, adjectives, noun in word.findall(body):
            count = 1 if number in ("a", "an") else NUMBERS.index(number)
            wanted = {*adjectives.split(), noun} - {"thing", "object", "shape", "item"}
            assert count == sum(wanted <= {o.size, o.texture, o.color, o.shape} for o in drawn.objects), caption
            told += count
        assert told == len(drawn.objects), caption
    assert len(wordings) >= 5


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"width": 20}, "20x128"),
        ({"min_objects": 0}, "min_objects 0"),
        ({"min_objects": 5, "max_objects": 4}, "min_objects 5"),
        ({"max_objects": 13}, "max_objects 13"),
        ({"shapes": ("circle", "blob")}, "'blob'"),
        ({"styles": ()}, "styles is empty"),
        ({"distinct": True, "max_objects": 12}, "distinct scenes of 12 objects"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        SceneConfig(**settings)


def test_in_distinct_scenes_no_two_share_a_colour_or_a_shape() -> None:
    for seed in range(60):
        things = scene(seed, SceneConfig(min_objects=2, max_objects=8, distinct=True)).objects
        assert len({each.shape for each in things}) == len({each.color for each in things}) == len(things)


def test_settings_are_kept() -> None:
    config = SceneConfig(64, 64, 3, 5, shapes=("star", "heart"), colors=("red", "blue"), textures=("dotted",))
    for seed in range(100):
        drawn = scene(seed, config)
        assert drawn.picture().size == (64, 64) and 3 <= len(drawn.objects) <= 5
        assert {each.shape for each in drawn.objects} <= {"star", "heart"}
        assert {each.color for each in drawn.objects} <= {"red", "blue"}
        assert {each.texture for each in drawn.objects} == {"dotted"}
    crowded = [scene(seed, SceneConfig(min_objects=12)) for seed in range(100)]
    assert {len(drawn.objects) for drawn in crowded} == {12}


def pictures_a_second(first: int, count: int) -> float:
    """Pictures with twelve questions each, by the processor's time."""
    start = time.process_time()
    for seed in range(first, first + count):
        drawn = scene(seed)
        drawn.picture()
        questions(drawn, random.Random(seed), 12)
    return count / (time.process_time() - start)


def test_drawing_is_fast_enough_to_feed_training() -> None:
    pictures_a_second(0, 400)
    assert pictures_a_second(400, 300) > 120


@pytest.mark.slow
def test_three_hundred_pictures_a_second_with_questions() -> None:
    pictures_a_second(0, 4000)
    rate = max(pictures_a_second(4000 + 500 * turn, 500) for turn in range(3))
    print(f"{rate:.0f} pictures a second")
    assert rate >= 300
