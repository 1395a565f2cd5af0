"""Each format gives the conversations that its files hold."""

import base64
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from sightline.core.errors import DataError
from sightline.core.geometry import Box
from sightline.core.sequence import Conversation, Image, Message, Region, Text, Video
from sightline.data.formats import Files, Record, captions_of, open_files
from sightline.data.images import PadSquare
from sightline.data.media import open_image

Write = Callable[..., Path]


def told(talk: Conversation) -> list[Any]:
    """A conversation as roles and words, a picture as its colour, a box as its numbers."""
    out: list[Any] = []
    for message in talk:
        parts: list[Any] = []
        for part in message.parts:
            if isinstance(part, Image):
                parts.append(part.picture.getpixel((0, 0)))
            elif isinstance(part, Region):
                assert isinstance(part.shape, Box)
                parts.append((part.shape.label, *part.shape.xyxy))
            else:
                assert isinstance(part, Text)
                parts.append(part.text)
        out.append((message.role, *parts))
    return out


RED, GREEN = (255, 0, 0), (0, 128, 0)

# ------------------------------------------------------------------------------------------------------- conversations


def test_llava_rows_put_pictures_where_their_placeholders_stand(write: Write) -> None:
    def turns(*values: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]

    rows = [
        {"id": "a", "image": "red.png", "conversations": turns("<image>\nWhat is it?", "red", "Sure?", "Yes.\nVery.")},
        {"image": ["red.png", "green.png"], "conversations": turns("First <image>, then\n<image>", "red")},
        {"conversations": [{"from": "system", "value": "be short"}, *turns("2+2?", "4")]},
    ]
    for name in ("rows.json", "rows.jsonl"):
        reader = open_files("llava", Files(write(name, rows)))
        assert [told(reader[i].conversation) for i in range(3)] == [
            [
                ("user", RED, "What is it?"),
                ("assistant", "red"),
                ("user", "Sure?"),
                ("assistant", "Yes.\nVery."),
            ],
            [("user", "First ", RED, ", then", GREEN), ("assistant", "red")],
            [("system", "be short"), ("user", "2+2?"), ("assistant", "4")],
        ]
        with pytest.raises(IndexError):
            reader[3]


def test_a_llava_row_that_begins_with_an_answer_goes_on_with_the_question(write: Write) -> None:
    """As ShareGPT's long talks do where they were cut into rows; an answer alone is nothing to learn from."""
    talk = [{"from": ("gpt", "human")[i % 2], "value": value} for i, value in enumerate(["so.", "2+2?", "4"])]
    reader = open_files("llava", Files(write("rows.json", [{"conversations": talk}, {"conversations": talk[:1]}])))
    assert told(reader[0].conversation) == [("user", "2+2?"), ("assistant", "4")]
    with pytest.raises(DataError, match="assistant speak, expected user and assistant in turn"):
        reader[1]


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"image": "red.png", "conversations": ["what?", "red"]}, "1 images for 0 placeholders <image>"),
        ({"conversations": ["<image>", "red"]}, "0 images for 1 placeholders <image>"),
        ({"image": ["red.png"], "conversations": ["<image><image>", "red"]}, "1 images for 2 placeholders"),
        ({"image": "red.png", "conversations": ["what?", "<image>red"]}, "a placeholder in an answer"),
        ({"conversations": []}, "nobody speak, expected user and assistant in turn"),
        ({"conversations": ["what?"]}, "user speak, expected user and assistant in turn"),
        ({"conversations": ["what?", " "]}, "a turn is empty"),
        ({"conversations": ["what?", "half \ud800"]}, "a turn holds half a character"),
        ({}, "'conversations' is missing"),
    ],
)
def test_llava_rows_that_contradict_themselves_are_told(write: Write, row: dict[str, Any], fault: str) -> None:
    if "conversations" in row:
        row["conversations"] = [
            {"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(row["conversations"])
        ]
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: {fault}"):
        open_files("llava", Files(write("rows.jsonl", [row])))[0]


def test_openai_messages_bring_pictures_as_paths_or_in_the_row(folder: Path, write: Write) -> None:
    url = "data:image/png;base64," + base64.b64encode((folder / "green.png").read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": "red.png"}},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    rows = [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "two"}]}]
    (found,) = (open_files("openai", Files(write("rows.jsonl", rows)))[0],)
    assert told(found.conversation) == [("user", RED, "and", GREEN), ("assistant", "two")]
    rows[0]["messages"].insert(0, {"role": "tool", "content": "x"})
    with pytest.raises(DataError, match="'tool' speaks, expected user, assistant, system"):
        open_files("openai", Files(write("rows.jsonl", rows)))[0]


def film(row: dict[str, Any], write: Write, frames: int = 8) -> Video:
    talk = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "it reddens"}]
    reader = open_files("llava", Files(write("rows.jsonl", [{**row, "conversations": talk}]), frames=frames))
    video, asked = reader[0].conversation[0].parts
    assert isinstance(video, Video) and asked == Text("What happens?")
    return video


def test_videos_are_folders_of_frames_or_lists_with_times(write: Write) -> None:
    video = film({"video": "film", "fps": 4}, write, frames=12)
    assert [frame.picture.getpixel((0, 0))[0] for frame in video.frames] == [20 * i for i in range(12)]
    assert video.times == tuple(i / 4 for i in range(12))
    few = film({"video": "film"}, write, frames=3)  # first, middle, last
    assert [frame.picture.getpixel((0, 0))[0] for frame in few.frames] == [0, 120, 220] and few.times == (0, 6, 11)
    named = film({"video": ["red.png", "green.png"], "times": [0.5, 2]}, write)
    assert [f.picture.getpixel((0, 0)) for f in named.frames] == [RED, GREEN] and named.times == (0.5, 2)
    for row, fault in [
        ({"video": ["red.png"], "times": [0, 1]}, "1 frames for 2 times"),
        ({"video": ["red.png", "green.png"], "times": [1, 1]}, "the times of a video do not rise"),
        ({"video": "below/none"}, "below/none: no such file"),
        ({"video": "red.png"}, "red.png: not a film; expected an animated GIF or WebP"),
        ({"video": []}, "0 frames for 0 times"),
        ({"video": "film", "fps": 0}, "12 frames for 0 times"),
    ]:
        with pytest.raises(DataError, match=fault):
            film(row, write)


def test_a_film_s_file_tells_its_times_itself(folder: Path, write: Write) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), (i * 50, 0, 0)) for i in range(5)]
    frames[0].save(folder / "film.webp", save_all=True, append_images=frames[1:], duration=500, lossless=True)
    video = film({"video": "film.webp"}, write, frames=3)
    assert [frame.picture.getpixel((0, 0))[0] for frame in video.frames] == [0, 100, 200] and video.times == (0, 1, 2)
    (folder / "film.webp").write_bytes((folder / "film.webp").read_bytes()[:-60])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: film\.webp: .*(damaged or cut off|not an animated)"):
        film({"video": "film.webp"}, write)
    (folder / "film" / "frame5.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: film/frame5\.png: not a picture"):
        film({"video": "film"}, write, frames=12)


# -------------------------------------------------------------------------------------------------------------- shards


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_shards_pair_pictures_with_captions_across_archives(folder: Path) -> None:
    red, green, blue = ((folder / f"{color}.png").read_bytes() for color in ("red", "green", "blue"))
    (folder / "shards").mkdir()
    first = [
        ("000000000.png", red),
        ("000000000.txt", b"a red one\n"),
        ("000000000.json", b'{"caption": "other"}'),
        ("000000001.json", b'{"caption": "a green one"}'),
        ("000000001.png", green),
    ]
    shard(folder / "shards" / "00000.tar", first)
    shard(folder / "shards" / "00001.tar", [("000010000.png", blue), ("000010000.txt", "böse".encode())])
    reader = open_files("shards", Files(folder / "shards", prompt="What?"))
    assert [told(reader[i].conversation) for i in range(len(reader))] == [
        [("user", RED, "What?"), ("assistant", "a red one")],
        [("user", GREEN, "What?"), ("assistant", "a green one")],
        [("user", (0, 0, 255), "What?"), ("assistant", "böse")],
    ]
    assert [reader.name(i).rpartition("/")[2] for i in range(3)] == [
        "00000.tar:000000000",
        "00000.tar:000000001",
        "00001.tar:000010000",
    ]


def test_shards_name_each_sample_that_cannot_be_used(folder: Path) -> None:
    red = (folder / "red.png").read_bytes()
    members = [
        ("a.png", red[:60]),
        ("a.txt", b"cut"),
        ("b.png", red),
        ("b.txt", b"\xff\xfe"),
        ("c.png", red),
        ("c.json", b'{"caption": null}'),
        ("d.png", b""),
        ("d.txt", b"nothing"),
        ("e.png", red),
        ("e.txt", b" \n"),
    ]
    reader = open_files("shards", Files(shard(folder / "s.tar", members)))
    faults = ("damaged or cut off", "cannot be read", "'caption' is NoneType", "the file is empty", "caption is empty")
    for i, fault in enumerate(faults):
        with pytest.raises(DataError, match=rf"s\.tar:{'abcde'[i]}: .*{fault}"):
            reader[i]


def test_a_key_that_comes_again_is_another_sample(folder: Path) -> None:
    red, green = ((folder / f"{color}.png").read_bytes() for color in ("red", "green"))
    members = [("a.png", red), ("a.txt", b"one"), ("a.json", b"{}"), ("a.txt", b"two"), ("a.png", green)]
    reader = open_files("shards", Files(shard(folder / "s.tar", members)))
    assert [told(reader[i].conversation)[0][1] for i in range(2)] == [RED, GREEN]
    assert [reader[i].conversation[1].text for i in range(2)] == ["one", "two"] and len(reader) == 2


def test_a_caption_without_its_picture_is_a_sample_that_cannot_be_used(folder: Path) -> None:
    reader = open_files("shards", Files(shard(folder / "s.tar", [("a.tiff", b"picture"), ("a.txt", b"words")])))
    with pytest.raises(DataError, match=r"s\.tar:a: no picture beside it \(\.jpg"):
        reader[0]


@pytest.mark.parametrize(
    "left, used, named",
    [
        (7 * 512 + 30, "a", "b"),  # in a picture
        (8 * 512 - 30, "ab", "b"),  # in what fills its last block up
        (4 * 512 + 100, "a", "a"),  # in a header
        (4 * 512, "a", "a"),  # between two samples, where nothing is missing but the archive's end
        (0, "a", "a"),  # nothing is cut off, but a header is no longer one
    ],
)
def test_of_an_archive_that_is_cut_off_what_is_whole_is_used(folder: Path, left: int, used: str, named: str) -> None:
    red = (folder / "red.png").read_bytes()
    assert len(red) < 512
    members = [(f"{key}.{kind}", data) for key in "ab" for kind, data in (("txt", b"words"), ("png", red))]
    path = shard(folder / "s.tar", members)
    content = bytearray(path.read_bytes())
    if not left:
        content[4 * 512 : 5 * 512] = b"x" * 512
    path.write_bytes(content[:left] if left else content)
    reader = open_files("shards", Files(path))
    assert len(reader) == len(used) + 1
    assert [reader.name(i)[-1] for i in range(len(used))] == list(used)
    for i in range(len(used)):
        assert reader[i].conversation[1].text == "words"
    with pytest.raises(DataError, match=rf"s\.tar:{named}: the archive is cut off or damaged behind this"):
        reader[len(used)]


def test_what_is_no_archive_is_told_at_once(folder: Path) -> None:
    for content, fault in [(b"", "empty file"), (b"<html>404</html>" * 99, "not a tar archive"), (b"\x1f\x8b", "gzip")]:
        (folder / "s.tar").write_bytes(content)
        with pytest.raises(DataError, match=rf"s\.tar: .*{fault}"):
            open_files("shards", Files(folder / "s.tar"))
    (folder / "none").mkdir()
    with pytest.raises(DataError, match=r"none: no \.tar in it"):
        open_files("shards", Files(folder / "none"))


# ----------------------------------------------------------------------------------------------------------- questions


def test_vqa_and_ok_vqa_answer_with_what_most_people_said(folder: Path, write: Write) -> None:
    for number, color, where in ((9, "red", "."), (10, "green", "val2014")):
        (folder / where).mkdir(exist_ok=True)
        PIL.Image.open(folder / f"{color}.png").save(folder / where / f"COCO_val2014_{number:012d}.jpg", quality=100)
    rows = [{"image_id": i, "question": f"What is {i}?", "question_id": i * 1000} for i in (9, 10, 9)]
    rows[2]["question_id"] = 77
    said = [
        {"question_id": 9000, "multiple_choice_answer": "red", "answers": []},
        {"question_id": 10000, "answers": [{"answer": each} for each in ("lime", "green", "green")]},
    ]
    questions = write("q.json", {"data_subtype": "val2014", "questions": rows})
    answers = write("a.json", {"annotations": said})
    prompt = "{}\nAnswer in a word."
    reader = open_files("vqa", Files(questions, annotations=answers, prompt=prompt))
    assert [told(reader[i].conversation)[0][2] for i in range(2)] == [
        f"What is {i}?\nAnswer in a word." for i in (9, 10)
    ]
    assert [reader[i].conversation[1].text for i in range(2)] == ["red", "green"]
    assert told(reader[0].conversation)[0][1][0] > 200 > 50 > told(reader[1].conversation)[0][1][0]
    with pytest.raises(DataError, match=r"q\.json:77: no annotation with the question_id 77"):
        reader[2]
    answers = write("a.json", {"annotations": [*said, said[1], {**said[0], "multiple_choice_answer": "blue"}]})
    reader = open_files("vqa", Files(questions, annotations=answers))
    assert reader[1].conversation[1].text == "green"
    with pytest.raises(DataError, match=r"q\.json:9000: 2 different ones for annotation with the question_id 9000"):
        reader[0]


def test_textvqa_and_gqa(folder: Path, write: Write) -> None:
    PIL.Image.new("RGB", (9, 9), RED).save(folder / "abc.jpg", quality=100)
    row = {"question": "What does it say?", "image_id": "abc", "answers": ["stop", "halt", "halt"], "question_id": 3}
    text = open_files("textvqa", Files(write("t.json", {"data": [row]})))[0]
    assert told(text.conversation)[0][2:] == ("What does it say?",) and text.conversation[1].text == "halt"
    rows = {"077": {"imageId": "abc", "question": "Is it red?", "answer": "yes"}, "078": {"imageId": "abc"}}
    gqa = open_files("gqa", Files(write("g.json", rows)))
    assert told(gqa[0].conversation)[1] == ("assistant", "yes")
    with pytest.raises(DataError, match=r"g\.json:078: the question is NoneType, expected str"):
        gqa[1]


# --------------------------------------------------------------------------------------------------------------- boxes

COCO: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "red.png", "width": 40, "height": 20},
        {"id": 2, "file_name": "green.png", "width": 40, "height": 20},
        {"id": 3, "file_name": "blue.png", "width": 20, "height": 40},
    ],
    "annotations": [
        {"id": 10, "image_id": 1, "bbox": [1, 2, 10, 5.5], "category_id": 7},
        {"id": 11, "image_id": 1, "bbox": [30, 10, 10.4, 10], "category_id": 8},
        {"id": 12, "image_id": 1, "bbox": [0, 0, 40, 20], "category_id": 8, "iscrowd": 1},
        {"id": 13, "image_id": 3, "bbox": [0, 0, 1, 1], "category_id": 8},
    ],
    "categories": [{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}],
}


def test_coco_gives_all_boxes_of_a_picture_in_its_own_pixels(write: Write) -> None:
    reader = open_files("coco", Files(write("c.json", COCO)))
    assert len(reader) == 2
    talk = reader[0].conversation
    assert told(talk) == [
        ("user", RED, "Where is every object?"),
        ("assistant", ("dog", 1, 2, 11, 7.5), ("cat", 30, 10, 40, 20)),  # what rounding let stand out is cut off
    ]
    with pytest.raises(DataError, match=r"c\.json:3: boxes in a picture of 20x40, found 40x20 pixels"):
        reader[1]


def test_boxes_go_the_way_of_their_picture(write: Write) -> None:
    """The chain that makes the picture square takes its boxes along."""
    talk = open_files("coco", Files(write("c.json", COCO)))[0].conversation
    image, region = talk[0].parts[0], talk[1].parts[0]
    assert isinstance(image, Image) and isinstance(region, Region) and isinstance(region.shape, Box)
    _, way = PadSquare(80)(image.picture)
    assert way.apply(region.shape).xyxy == (2, 24, 22, 35)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_turned_with_their_picture(folder: Path, write: Write, orientation: int) -> None:
    """Whether they count in the pixels as they are stored or as they are seen, which only the size tells."""
    stored = PIL.Image.new("RGB", (40, 20), "black")
    stored.paste("red", (4, 2, 16, 8))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored.save(folder / "turned.png", exif=exif)
    about: dict[str, Any] = {"id": 1, "file_name": "turned.png", "width": 40, "height": 20}
    content = {**COCO, "images": [about], "annotations": [{"image_id": 1, "bbox": [4, 2, 12, 6], "category_id": 7}]}
    reader = open_files("coco", Files(write("c.json", content)))
    if orientation in (2, 3, 4):
        with pytest.raises(DataError, match=rf"c\.json:1: .* stored turned \(EXIF {orientation}\), and nothing tells"):
            reader[0]
        return
    image, region = reader[0].conversation[0].parts[0], reader[0].conversation[1].parts[0]
    assert isinstance(image, Image) and isinstance(region, Region) and isinstance(region.shape, Box)
    seen = np.asarray(image.picture)[..., 0] > 128
    rows, columns = np.nonzero(seen)
    assert region.shape.xyxy == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    if orientation == 1:
        return
    upright = {**about, "width": 20, "height": 40}
    content |= {"images": [upright], "annotations": [{"image_id": 1, "bbox": [1, 30, 5, 7], "category_id": 7}]}
    (_, answer) = open_files("coco", Files(write("c.json", content)))[0].conversation
    assert isinstance(answer.parts[0], Region) and answer.parts[0].shape.xyxy == (1, 30, 6, 37)
    del upright["width"], upright["height"]
    with pytest.raises(DataError, match="nothing tells"):
        open_files("coco", Files(write("c.json", content)))[0]


def test_ids_that_several_have_are_nobodys(write: Write) -> None:
    images = [*COCO["images"][:2], {**COCO["images"][1], "id": 1}]
    reader = open_files("coco", Files(write("c.json", {**COCO, "images": images})))
    for i in range(len(reader)):
        with pytest.raises(DataError, match=r"c\.json:1: 2 different ones for image 1"):
            reader[i]
    boxes = [*COCO["annotations"][:1], {**COCO["annotations"][1], "id": 10}]
    captioned = [{**each, "caption": "it"} for each in COCO["images"]]
    reader = open_files("refcoco", Files(write("r.json", {"images": captioned, "annotations": boxes})))
    assert len(reader) == 2
    with pytest.raises(DataError, match=r"r\.json:10: 2 different ones for annotation 10"):
        reader[1]


@pytest.mark.parametrize(
    "bbox, fault",
    [
        ([float("nan"), 0, 5, 5], "a side of a box is nan"),
        ([-3, 0, 5, 5], "outside a picture of 40x20 pixels"),
        ([38, 0, 5, 5], "outside a picture of 40x20 pixels"),
        ([1e9, 0, 5, 5], "outside a picture of 40x20 pixels"),
        ([5, 5, -3, 5], "expected left, top, width, height with some area"),
        ([5, 5, 3, 0], "with some area"),
        ([5, 5, 3], "expected left, top, width, height"),
        (None, "a box is NoneType, expected list"),
    ],
)
def test_a_box_that_cannot_be_is_told(write: Write, bbox: Any, fault: str) -> None:
    content = {**COCO, "annotations": [{"id": 10, "image_id": 1, "bbox": bbox, "category_id": 7}]}
    with pytest.raises(DataError, match=rf"c\.json:1: .*{fault}"):
        open_files("coco", Files(write("c.json", content)))[0]


def test_refcoco_asks_for_each_phrase(write: Write) -> None:
    refs = [
        {"ref_id": 1, "ann_id": 10, "image_id": 1, "sentences": [{"raw": "the dog"}, {"sent": "left one"}]},
        {"ref_id": 2, "ann_id": 999, "sentences": ["nobody"]},
    ]
    reader = open_files("refcoco", Files(write("refs.json", refs), annotations=write("instances.json", COCO)))
    assert [told(reader[i].conversation) for i in range(2)] == [
        [("user", RED, f"Where is {phrase}?"), ("assistant", (phrase, 1, 2, 11, 7.5))]
        for phrase in ("the dog", "left one")
    ]
    with pytest.raises(DataError, match=r"refs\.json:ref 2: no annotation 999"):
        reader[2]
    images = [{**COCO["images"][0], "caption": "the cat"}]
    one = {"images": images, "annotations": COCO["annotations"][1:2]}
    found = open_files("refcoco", Files(write("mdetr.json", one)))[0].conversation
    assert told(found) == [("user", RED, "Where is the cat?"), ("assistant", ("the cat", 30, 10, 40, 20))]


# --------------------------------------------------------------------------------------------------------- preferences


def answers_of(record: Record) -> tuple[str, str]:
    """The better and the worse answer."""
    assert record.chosen is not None and record.rejected is not None
    return record.chosen.text, record.rejected.text


def test_rlhf_v_gives_both_answers(write: Write) -> None:
    said = {"question": "What?", "chosen": "red", "rejected": "blue"}
    rows = [{"image": "red.png", **said}, {"image": "red.png", "text": json.dumps(said)}]
    rows.append({"image": "red.png", **said, "rejected": "red"})
    reader = open_files("rlhf-v", Files(write("rows.json", rows)))
    for i in range(2):
        assert told(reader[i].conversation) == [("user", RED, "What?")]
        assert answers_of(reader[i]) == ("red", "blue")
    with pytest.raises(DataError, match="both answers are the same"):
        reader[2]


@pytest.mark.parametrize("columns", [False, True])
def test_vlfeedback_gives_every_two_answers_of_unequal_rating(write: Write, columns: bool) -> None:
    """Of ratings 4, 2, 4 and one that nobody gave, 4 beats 2 twice."""

    def rated(each: int | str) -> dict[str, Any]:
        names = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
        return {name: {"Rating": str(each), "Rationale": ""} for name in names}

    answers = [{"response": f"answer {i}", "annotations": rated(r)} for i, r in enumerate((4, 2, 4, "N/A"))]
    laid: Any = {key: [a[key] for a in answers] for key in ("response", "annotations")} if columns else answers
    rows = [{"img_path": "red.png", "prompt": "What?", "completions": laid}, {"prompt": "What?", "completions": 3}]
    reader = open_files("vlfeedback", Files(write("rows.jsonl", rows)))
    assert [answers_of(reader[i]) for i in range(2)] == [
        ("answer 0", "answer 1"),
        ("answer 2", "answer 1"),
    ]
    assert reader.name(1).endswith("rows.jsonl:1 answers 2, 1") and len(reader) == 3
    with pytest.raises(DataError, match=r"rows\.jsonl:2 .*'completions' is int, expected list"):
        reader[2]


def test_llava_rlhf_gives_the_dialogue_before_both_answers(write: Write) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "a colour"},
        {"from": "human", "value": "Which?"},
        {"from": "gpt", "value": "whatever stands here"},
    ]
    outputs = {"output_1": {"from": "llava", "value": "red"}, "output_2": {"from": "llava", "value": "blue"}}
    rows = [{"image": "red.png", "conversations": turns, "preference": k, **outputs} for k in (1, 2, 3)]
    reader = open_files("llava-pairs", Files(write("rows.json", rows)))
    assert told(reader[0].conversation) == [("user", RED, "What?"), ("assistant", "a colour"), ("user", "Which?")]
    assert [answers_of(reader[k]) for k in range(2)] == [("red", "blue"), ("blue", "red")]
    with pytest.raises(DataError, match="'preference' is 3, expected 1 or 2"):
        reader[2]


def test_openai_preferences_give_the_dialogue_before_both_answers(write: Write) -> None:
    content = [{"type": "image_url", "image_url": {"url": "red.png"}}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    said = {name: [{"role": "assistant", "content": name}] for name in ("preferred_output", "non_preferred_output")}
    row: dict[str, Any] = {"input": {"messages": messages}, **said}
    twice = {**row, "preferred_output": said["preferred_output"] * 2}
    ended = {**row, "input": {"messages": [*messages, *said["preferred_output"]]}}
    same = {**row, "non_preferred_output": said["preferred_output"]}
    reader = open_files("openai-pairs", Files(write("rows.jsonl", [row, twice, ended, same])))
    assert told(reader[0].conversation) == [("user", RED, "What?")]
    assert answers_of(reader[0]) == ("preferred_output", "non_preferred_output")
    for k, wrong in enumerate(("more or less than one answer", "expected user and assistant in turn", "the same"), 1):
        with pytest.raises(DataError, match=wrong):
            reader[k]


@pytest.mark.parametrize("key", ["below/black.png", "black.png", "black"])
def test_captions_are_found_by_path_name_or_stem(write: Write, folder: Path, key: str) -> None:
    black, red, white = (open_image(folder / name, name) for name in ("below/black.png", "red.png", "white.png"))
    path = write(f"{Path(key).name}.json", {key: ["night", "dark"], "red": "fire"})
    assert captions_of(path, [black, red]) == ("night", "dark", "fire")
    with pytest.raises(DataError, match=r"has no caption of white\.png"):
        captions_of(path, [white])


def test_captions_of_coco_belong_to_its_pictures(write: Write, folder: Path) -> None:
    images = [{"id": 7, "file_name": "red.png"}, {"id": 8, "file_name": "blue.png"}]
    said = [{"image_id": 7, "caption": "fire"}, {"image_id": 8, "caption": "sea"}, {"image_id": 7, "caption": "blood"}]
    path = write("coco.json", {"images": images, "annotations": said})
    assert captions_of(path, [open_image(folder / "red.png", "red.png")]) == ("fire", "blood")


# ----------------------------------------------------------------------------------------------------------- real data


def test_pictures_that_others_made_are_read_as_llava_rows(real_data: Path, tmp_path: Path) -> None:
    """Every file of the taste of real data that this machine may have, through a reader, with no fault."""
    lines = (real_data / "data.jsonl").read_text().splitlines()
    rows = []
    for line in lines[::20]:
        row = json.loads(line)
        if not row["answers"]:
            continue
        turns = [("human", f"<image>\n{row['question']}"), ("gpt", row["answers"][0])]
        rows.append({"image": row["image"], "conversations": [{"from": a, "value": b} for a, b in turns]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    reader = open_files("llava", Files(tmp_path / "rows.json", images=real_data))
    for i, row in enumerate(rows):
        picture = reader[i].conversation[0].parts[0]
        assert picture == open_image(real_data / row["image"])
        assert reader[i].conversation[1] == Message("assistant", (Text(row["conversations"][1]["value"]),))
