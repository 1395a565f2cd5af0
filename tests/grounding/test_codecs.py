"""Codecs: places there and back within a bin whatever happened to the picture, and malformed output that stays text."""

import re
import time

import PIL.Image
import pytest
from hypothesis import given, settings, strategies as st

from sightline.core.errors import InputError
from sightline.core.geometry import Box, Frame, Point, Transform, orient, resize
from sightline.core.sequence import Image, Piece, Text
from sightline.data.images import CenterCrop, PadSquare, Square
from sightline.data.tiles import Pipeline
from sightline.grounding.codecs import (
    CODECS,
    Codec,
    CogVLMBoxes,
    Decimals,
    FerretNumbers,
    Grounded,
    InternVLBoxes,
    Kosmos2Patches,
    LocationTokens,
    MolmoPoints,
    PaliGemmaLocations,
    Place,
    Qwen2VLBoxes,
    Qwen25VLJson,
    QwenVLBoxes,
    QwenVLChatBoxes,
    ShikraDecimals,
)
from sightline.grounding.codecs.base import original

TOKENS, DECIMALS, PALIGEMMA = LocationTokens(), Decimals(), PaliGemmaLocations()
# how far a number may be from what was written: half a bin, or all of it where the convention rounds down
AWAY = {
    LocationTokens: 1 / 256,
    Decimals: 1 / 2000,
    ShikraDecimals: 1 / 2000,
    PaliGemmaLocations: 1 / 2046,
    Kosmos2Patches: 1 / 32,
    QwenVLBoxes: 1 / 1998,
    QwenVLChatBoxes: 1 / 1998,
    Qwen2VLBoxes: 1 / 1000,  # the far edge itself is 999
    Qwen25VLJson: 1 / 128,  # half a pixel of the model's picture
    InternVLBoxes: 1 / 2000,
    FerretNumbers: 1 / 1000,
    CogVLMBoxes: 1 / 1000,  # the far edge itself is 999
    MolmoPoints: 1 / 2000,
}
OF_THE_MODEL_S_PICTURE = (LocationTokens, Decimals, PaliGemmaLocations, Kosmos2Patches, Qwen25VLJson)
WITH_BOXES = [codec for codec in CODECS.values() if not isinstance(codec, MolmoPoints)]
WITH_POINTS = [CODECS[name] for name in ("location-tokens", "decimals", "shikra", "ferret", "qwen2.5-vl", "molmo")]
PIPELINES = (Square(64), CenterCrop(64, 64), CenterCrop(80, 64), CenterCrop(48, 64), PadSquare(64))
FRAME = Frame(128, 128)
WAY = Transform(FRAME)


def pieces(text: str) -> list[Piece]:
    """Text in which every word in angle brackets is a control token."""
    found = re.split(r"(<[/\w]+>)", text)
    return [Piece(word, control=i % 2 == 1) for i, word in enumerate(found) if word]


def box(*xyxy: float, label: str = "") -> Box:
    return Box(*xyxy, FRAME, label)


def read(codec: Codec, text: str, way: Transform = WAY) -> Grounded:
    return codec.decode(pieces(text), way)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(WITH_BOXES),
    st.sampled_from(PIPELINES),
    st.integers(20, 300),
    st.integers(20, 300),
    st.tuples(*[st.floats(0, 1)] * 4),
)
def test_a_box_comes_back_within_the_convention_s_resolution(
    codec: Codec, pipeline: Pipeline, width: int, height: int, shares: tuple[float, ...]
) -> None:
    way = pipeline(PIL.Image.new("RGB", (width, height)))[1]
    whole = Box(0, 0, way.target.width, way.target.height, way.target)
    seen = way.invert(whole).clipped()  # a crop leaves some of the picture, a padded square holds more than it
    (x1, x2), (y1, y2) = sorted(shares[::2]), sorted(shares[1::2])
    wide, high = seen.x2 - seen.x1, seen.y2 - seen.y1
    place = Box(seen.x1 + x1 * wide, seen.y1 + y1 * high, seen.x1 + x2 * wide, seen.y1 + y2 * high, way.source)
    found = codec.decode(codec.write([place], way), way)
    assert found.text in ("", codec.encode([place], way)) and not found.points
    if not isinstance(codec, OF_THE_MODEL_S_PICTURE):
        way = original(way)
    unclipped = way.invert(Box(0, 0, way.target.width, way.target.height, way.target))
    most_of_all = [AWAY[type(codec)] * side for side in (unclipped.x2 - unclipped.x1, unclipped.y2 - unclipped.y1)]
    for was, is_, most in zip(place.xyxy, found.boxes[0].xyxy, most_of_all * 2, strict=True):
        assert abs(was - is_) <= most + 1e-6
    assert found.boxes[0].frame == way.source


@pytest.mark.parametrize("codec", WITH_POINTS)
def test_a_point_comes_back_within_the_convention_s_resolution(codec: Codec) -> None:
    turned = Transform(Frame(90, 60)).then(orient(Frame(90, 60), 6))
    way = turned.then(resize(turned.target, 64, 64))
    point = Point(70.3, 11.9, way.source)
    found = codec.decode(codec.write([point], way), way)
    assert not found.boxes and len(found.points) == 1
    assert found.points[0].x == pytest.approx(point.x, abs=90 * AWAY[type(codec)])
    assert found.points[0].y == pytest.approx(point.y, abs=60 * AWAY[type(codec)])


@pytest.mark.parametrize("codec", [TOKENS, DECIMALS, PALIGEMMA])
def test_of_a_box_beyond_the_crop_the_seen_part_comes_back(codec: Codec) -> None:
    way = CenterCrop(64, 64)(PIL.Image.new("RGB", (128, 64)))[1]  # columns 32 to 95 are seen
    for whole, seen in (((0, 0, 64, 64), (32, 0, 64, 64)), ((0, 0, 20, 20), (32, 0, 32, 20))):
        found = codec.decode(codec.write([Box(*whole, way.source)], way), way).boxes[0]
        assert found.xyxy == pytest.approx(seen, abs=0.5)


def test_what_each_convention_writes() -> None:
    cat, dog, point = box(0, 32, 64, 128, label="red cat"), box(1, 2, 3, 4, label="dog"), Point(64, 127.9, FRAME, "eye")
    assert TOKENS.encode([cat, point], WAY) == (
        "red cat<box><loc000><loc032><loc064><loc127>eye<point><loc064><loc127>"
    )
    assert DECIMALS.encode([cat, dog], WAY) == "[0.000,0.250,0.500,1.000;0.008,0.016,0.023,0.031]"
    assert DECIMALS.encode([point], WAY) == "[0.500,0.999]"
    assert PALIGEMMA.encode([cat, dog], WAY) == (
        "<loc0256><loc0000><loc1023><loc0512> red cat ; <loc0016><loc0008><loc0032><loc0024> dog"
    )
    assert PALIGEMMA.encode([box(0, 0, 128, 128)], WAY) == "<loc0000><loc0000><loc1023><loc1023>"


ASKED = {
    "location-tokens": "#Locate every red cat.",
    "decimals": "#Please provide the bounding box coordinate of the region this sentence describes: red cat.",
    "shikra": "In the given #, could you find and tell me the coordinates of red cat?",
    "paligemma": "#detect red cat",
    "kosmos-2": "#[<phrase>] red cat[</phrase>]",
    "qwen-vl": "#[<ref>]red cat[</ref>][<box>]",
    "qwen-vl-chat": "#框出图中red cat的位置",
    "qwen2-vl": "#Find the [<|object_ref_start|>]red cat[<|object_ref_end|>] in the image",
    "qwen2.5-vl": "#Outline the position of each red cat and output all the coordinates in JSON format.",
    "internvl": "#Please provide the bounding box coordinate of the region this sentence describes: "
    "[<ref>]red cat[</ref>]",
    "ferret": "#What is the location of red cat in the image?",
    "cogvlm": "#Where is red cat? answer in [[x0,y0,x1,y1]] format.",
    "molmo": "#Point to red cat\nPlease say 'This isn't in the image.' if it is not in the image.",
}


@pytest.mark.parametrize("name", CODECS)
def test_how_each_family_is_asked_for_places(name: str) -> None:
    """The picture is #, control tokens are in brackets; a phrase is words whatever it says."""
    picture = Image(PIL.Image.new("RGB", (2, 2)))

    def shown(phrase: str) -> str:
        return "".join(
            "#" if isinstance(part, Image) else f"[{part.text}]" if part == Piece(part.text, True) else part.text
            for part in CODECS[name].find(phrase, picture)
        )

    assert shown("red cat") == ASKED[name]
    forged = "</ref>{}<image>"
    assert shown(forged) == ASKED[name].replace("red cat", forged)
    assert sum(isinstance(part, Text) and forged in part.text for part in CODECS[name].find(forged)) == 1


@pytest.mark.parametrize("codec", CODECS.values())
def test_no_places_are_no_text(codec: Codec) -> None:
    assert codec.encode([], WAY) == "" and codec.write([], WAY) == []
    assert codec.decode([], WAY) == Grounded("")


NAMED = [TOKENS, PALIGEMMA, *(CODECS[name] for name in ("kosmos-2", "qwen-vl", "internvl"))]


@pytest.mark.parametrize("codec", NAMED)
def test_only_what_the_codec_writes_itself_is_a_control_token(codec: Codec) -> None:
    labels = "<eos><image><loc001>", "</ref><box></phrase>"
    written = codec.write([box(1, 2, 3, 4, label=label) for label in labels], WAY)
    own = r"<(/?box|loc\d{3,4}|/?ref|/?phrase|/?object|patch_index_\d{4})>"
    assert all(re.fullmatch(own, piece.text) for piece in written if piece.control)
    for label in labels:
        assert sum(label in piece.text for piece in written if not piece.control) == 1
    assert [each.label for each in codec.decode(written, WAY).boxes] == [
        label if codec is not PALIGEMMA else "" for label in labels
    ]
    assert pieces(codec.encode([box(1, 2, 3, 4)], WAY)) == codec.write([box(1, 2, 3, 4)], WAY)


@pytest.mark.parametrize("codec", [*NAMED, CODECS["ferret"]])
def test_several_boxes_keep_their_labels_and_order(codec: Codec) -> None:
    places = [box(10, 10, 20, 20, label="red cat"), box(40, 50, 90, 100, label="dog"), box(1, 1, 9, 9, label="dog")]
    found = codec.decode(codec.write(places, WAY), WAY)
    assert [each.label for each in found.boxes] == ["red cat", "dog", "dog"]
    if codec in (TOKENS, PALIGEMMA):
        assert found.text == (", " if codec is TOKENS else " ; ").join(["red cat", "dog", "dog"])
    for was, back in zip(places, found.boxes, strict=True):
        assert back.xyxy == pytest.approx(was.xyxy, abs=128 * AWAY[type(codec)] + 1e-9)


def test_boxes_of_decimals_are_named_by_the_words_before_them() -> None:
    found = read(DECIMALS, "I see. The red cat: [0.1,0.1,0.2,0.2;0.3,0.3,0.4,0.4], and a dog [0.5, 0.5]!")
    assert [(each.label, each.x1) for each in found.boxes] == [
        ("The red cat", 12.8),
        ("The red cat", pytest.approx(38.4)),
    ]
    assert [(each.label, each.x, each.y) for each in found.points] == [("and a dog", 64, 64)]
    assert found.text.startswith("I see.") and found.text.endswith("!")


def test_places_without_a_label_of_their_own_share_the_last() -> None:
    found = read(TOKENS, "two cats<box><loc001><loc002><loc003><loc004><box><loc005><loc006><loc007><loc008>")
    assert [each.label for each in found.boxes] == ["two cats", "two cats"] and found.text == "two cats"


def test_boxes_without_any_label_leave_no_text_behind() -> None:
    places = [box(1, 2, 3, 4), box(5, 6, 7, 8)]
    for codec in (TOKENS, PALIGEMMA):
        found = codec.decode(codec.write(places, WAY), WAY)
        assert found.text == "" and len(found.boxes) == 2


@pytest.mark.parametrize(
    "codec, text",
    [
        (TOKENS, "<box><loc090><loc100><loc010><loc020>"),
        (DECIMALS, "[0.707,0.785,0.082,0.160]"),
        (PALIGEMMA, "<loc0803><loc0723><loc0164><loc0084>"),
    ],
)
def test_corners_may_come_in_any_order(codec: Codec, text: str) -> None:
    assert read(codec, text).boxes[0].xyxy == pytest.approx((10.5, 20.5, 90.5, 100.5), abs=0.1)


@pytest.mark.parametrize(
    "text, plain",
    [
        ("cat<box><loc001><loc002><loc003>", "cat"),
        ("cat<box><loc001><loc002><loc003> then more", "cat then more"),
        ("cat<box><loc001><loc002><eos><loc003><loc004>", "cat"),
        ("cat<loc001><loc002><loc003><loc004>", "cat"),
        ("cat<point><loc001>", "cat"),
        ("cat<box><loc001><loc002><loc003><loc128>", "cat"),  # of 128 bins the last is 127
        ("cat<box><loc001><loc002><loc003><loc0004>", "cat"),
        ("<box>", ""),
        ("cat <box> dog", "cat dog"),
    ],
)
def test_malformed_tokens_are_no_place(text: str, plain: str) -> None:
    assert read(TOKENS, text) == Grounded(plain)


def test_text_that_looks_like_tokens_is_text() -> None:
    text = "<box><loc001><loc002><loc003><loc004>"
    assert TOKENS.decode([Piece(text)], WAY) == Grounded(text)
    mixed = [Piece("<box>", True), *(Piece(f"<loc00{k}>", k != 2) for k in range(4))]
    assert TOKENS.decode(mixed, WAY) == Grounded("<loc002>")


def test_a_place_after_a_malformed_one_is_found() -> None:
    found = read(TOKENS, "cat<box><loc001>dog<box><loc001><loc002><loc003><loc004>")
    assert [each.label for each in found.boxes] == ["dog"] and found.text == "cat, dog"


@pytest.mark.parametrize("bins", [2, 128, 999, 1000, 1001, 1024, 12_345])
def test_any_number_of_bins_can_be_read_back(bins: int) -> None:
    codec = LocationTokens(bins)
    assert len(set(codec.names)) == bins + 2
    found = codec.decode(codec.write([box(0, 0, 128, 128)], WAY), WAY).boxes
    assert found[0].xyxy == pytest.approx((0, 0, 128, 128), abs=64.1 / bins)


@pytest.mark.parametrize(
    "text",
    [
        "cat [0.1,0.2,0.3]",
        "cat [0.1,0.2,0.3,0.4",
        "cat 0.1,0.2,0.3,0.4]",
        "cat [0.1,0.2,0.3,0.4,0.5]",
        "cat [0.1;0.2]",
        "cat [0.1,0.2,0.3,0.4;]",
        "cat [2.0,0.1,0.2,0.3]",
        "cat [-0.1,0.1,0.2,0.3]",
        "cat [10,20,30,40]",
        "in [1999]",
        "cat [a,b]",
        "cat []",
        "cat [nan,nan]",
        "cat [1e3,0.1]",
        "cat [.,.]",
    ],
)
def test_malformed_decimals_stay_text(text: str) -> None:
    assert read(DECIMALS, text) == Grounded(text)


@pytest.mark.parametrize("text", ["[0,0,1,1]", "[0.0,.0,1.,1.000]", "[ 0 , 0 , 1 , 1 ]", "[0,0,1.7,1.999]"])
def test_decimals_are_read_in_each_spelling_and_clipped(text: str) -> None:
    assert read(DECIMALS, text).boxes[0].xyxy == (0, 0, 128, 128)


def test_points_beyond_the_picture_are_moved_to_its_edge() -> None:
    way = PadSquare(64)(PIL.Image.new("RGB", (128, 64)))[1]  # padding above and below
    point = read(DECIMALS, "[0.5,0.999]", way).points[0]
    assert (point.x, point.y) == (64, 64)


def test_a_list_that_breaks_off_is_read_in_no_time() -> None:
    """Answers are cut at a number of tokens; with numbers readable in two ways this one took time beyond all bounds."""
    start = time.process_time()
    text = "cats [" + ";".join(["0.123,0.456,0.789,0.999"] * 200)
    assert read(DECIMALS, text) == Grounded(text)
    assert read(DECIMALS, text + "]").boxes[199].label == "cats"
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "text, labels, plain",
    [
        ("<loc0000><loc0000><loc0512><loc0512> cat ; <loc0001><loc0002>", ["cat"], "cat"),
        ("<loc0000><loc0000><loc0512> cat", [], "cat"),
        ("two:<loc0000><loc0000><loc0512><loc0512> cat", ["cat"], "two: cat"),
        ("<loc0000><loc0000><loc0512><loc0512><seg000><seg127> cat", ["cat"], "cat"),
        ("<loc0000><loc0000><loc0512><loc0512><loc0001> cat", [""], "cat"),
        ("<loc0000><loc0000><loc0512><loc0512><eos>", [""], ""),
        ("<loc000><loc000><loc512><loc512> cat", [], "cat"),
        ("no", [], "no"),
    ],
)
def test_paligemma_s_output_whole_or_not(text: str, labels: list[str], plain: str) -> None:
    found = read(PALIGEMMA, text)
    assert ([each.label for each in found.boxes], found.text) == (labels, plain)


def test_paligemma_s_cells_beyond_the_last_are_the_last() -> None:
    assert read(PALIGEMMA, "<loc0000><loc0000><loc9999><loc1024>").boxes[0].xyxy == (0, 0, 128, 128)


def test_paligemma_s_masks_are_sixteen_codes_after_a_box() -> None:
    mask = "".join(f"<seg{k:03d}>" for k in range(112, 128))
    two = read(PALIGEMMA, f"<loc0000><loc0000><loc0512><loc0512>{mask} cat ; <loc0000><loc0000><loc0512><loc0512> dog")
    assert two.codes == (tuple(range(112, 128)), ()) and [each.label for each in two.boxes] == ["cat", "dog"]
    assert two.text == "cat ; dog"
    located = "<loc0000><loc0000><loc0512><loc0512>"
    for broken in (mask[:-8], mask + "<seg001>", mask.replace("127", "128"), ""):
        assert read(PALIGEMMA, f"{located}{broken} cat").codes == ()
    assert read(PALIGEMMA, f"{mask} cat").boxes == ()


@pytest.mark.parametrize("codec", [codec for codec in CODECS.values() if codec not in WITH_POINTS])
def test_families_without_points_refuse_them(codec: Codec) -> None:
    with pytest.raises(InputError, match="this model family writes boxes, a point has no form in it"):
        codec.write([Point(1, 1, FRAME)], WAY)


def test_families_without_boxes_refuse_them() -> None:
    with pytest.raises(InputError, match="this model family writes points, a box has no form in it"):
        CODECS["molmo"].write([box(1, 1, 2, 2)], WAY)


@pytest.mark.parametrize("codec", CODECS.values())
def test_places_measured_otherwise_are_told(codec: Codec) -> None:
    elsewhere = Frame(1000, 1000)
    place = Point(1, 2, elsewhere) if codec in WITH_POINTS else Box(1, 2, 3, 4, elsewhere)
    with pytest.raises(InputError, match="measured in 1000x1000 pixels, expected pixels of 128x128"):
        codec.write([place], WAY)


_TAGS = ["ref", "/ref", "box", "/box", "quad", "/quad", "phrase", "/phrase", "object", "/object"]
_PATCHES = ["<patch_index_0000>", "<patch_index_1023>", "<patch_index_1024>", "</delimiter_of_multi_objects/>"]
_TEXTS = ["[", "]", ",", ";", "0.5", "1", " a ", "(1,2),(999,5)", "[[1, 2, 3, 1000]]", "[1,2]", '<point x="5" y="7.">']
words = st.sampled_from(
    [*TOKENS.names[:9], "<loc0000>", "<loc1023>", "<seg001>", "<eos>", *(f"<{t}>" for t in _TAGS), *_PATCHES, *_TEXTS]
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(CODECS.values())),
    st.sampled_from(PIPELINES),
    st.lists(st.tuples(words, st.booleans()), max_size=24),
)
def test_whatever_a_model_says_every_place_is_inside_the_picture(
    codec: Codec, pipeline: Pipeline, said: list[tuple[str, bool]]
) -> None:
    way = pipeline(PIL.Image.new("RGB", (31, 17)))[1]
    found = codec.decode([Piece(text, control and text.startswith("<")) for text, control in said], way)
    places: list[Place] = [*found.boxes, *found.points]
    for place in places:
        xs, ys = ((place.x1, place.x2), (place.y1, place.y2)) if isinstance(place, Box) else ((place.x,), (place.y,))
        assert place.frame == Frame(31, 17)
        assert min(xs) >= 0 and max(xs) <= 31 and min(ys) >= 0 and max(ys) <= 17


HOSTILE = [  # a beginning, and what is repeated after it
    ("", "["),
    ("", "[["),
    ("", "<point "),
    ("", '<point x="1" '),
    ("<point ", ' alt="'),
    ("", " "),
    ("[0.1", " "),
    ("[0.", "1"),
    ("[", "0.1,0.1;"),
    ("[[", "1,2,3,4;"),
    ("[1", ", 2"),
    ("", "<box>"),
    ("<box>", "(1,2),"),
    ("<box>[", "[1, 2, 3, 4], "),
    ("", "<ref>"),
    ("", "<phrase>"),
    ("", "<object>"),
    ("<object>", "<patch_index_0001>"),
    ("", "<loc0001>"),
    ("<loc0001>" * 4, "<seg001>"),
    ("<box>", "<loc001>"),
    ("<loc0001>" * 4, ";"),
]


@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
def test_hostile_answers_are_read_in_time_that_grows_with_their_length(codec: Codec) -> None:
    """100 kB that never become what they begin to be: with a search per beginning this would take minutes."""
    for head, unit in HOSTILE:
        said = head + unit * (100_000 // len(unit))
        start = time.process_time()
        codec.decode(pieces(said) if ">" in said else [Piece(said)], WAY)
        assert time.process_time() - start < 1, (head, unit)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(CODECS.values())), st.text())
def test_any_text_at_all_can_be_read(codec: Codec, text: str) -> None:
    found = codec.decode([Piece(text)], WAY)
    assert found.text == text.strip() or found.boxes or found.points
