"""Rows are found by number without being kept, pictures stay in their folder, and no row can break a reader."""

import bz2
import copy
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from sightline.core.errors import ConfigError, DataError
from sightline.data.formats import FORMATS, Files, Record, base, open_files
from sightline.data.formats.base import Rows, indexed

Write = Callable[..., Path]


def llava(words: str = "<image>\nWhat is it?", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": words}, {"from": "gpt", "value": "red"}]
    return {"image": "red.png", "conversations": turns, **more}


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("text", ["[{},\n {}]", ' [{"a": "]\\"é"} ,{"b":[1]}] ', "[]", "\ufeff[{}]"])
def test_elements_of_an_array_are_found_by_number(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    rows = Rows(path)
    wanted = json.loads(text.removeprefix("\ufeff"))
    assert [rows[i] for i in range(len(rows))] == wanted
    assert [rows.name(i) for i in range(len(rows))] == [f"{path}[{i}]" for i in range(len(wanted))]


def test_lines_are_found_by_number_and_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": "é"}\r\n\n  \n{"a": 2}\n{"a": '.encode())
    rows = Rows(path)
    assert (len(rows), rows[0], rows[1]) == (3, {"a": "é"}, {"a": 2})
    assert [rows.name(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 4, 5)]
    with pytest.raises(DataError, match="not JSON"):
        rows[2]


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1},', "[1 2", "[{]", "[" * 100_000])
def test_an_array_that_is_cut_off_is_told_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rows\.json: not a JSON array") as told:
        Rows(path)
    assert "\n" not in str(told.value)


def test_the_index_of_a_large_file_is_kept_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(base, "WORTH_KEEPING", 4)
    path, built = tmp_path / "data", []

    def build(path: Path) -> np.ndarray:
        built.append(path.read_bytes())
        return np.array([[len(built[-1])]])

    path.write_bytes(b"12345")
    assert indexed(path, build) == indexed(path, build) == [[5]] and len(built) == 1
    path.write_bytes(b"123456")
    assert indexed(path, build) == [[6]] and len(built) == 2
    (kept,) = [p for p in (tmp_path / "cache" / "sightline" / "index").iterdir() if np.load(p) == [[6]]]
    kept.write_bytes(b"damaged")
    assert indexed(path, build) == [[6]] and len(built) == 3
    path.write_bytes(b"123")  # small ones are looked through again
    assert indexed(path, build) == [[3]] and indexed(path, build) == [[3]] and len(built) == 5


@pytest.mark.parametrize(
    "format, pack", [("llava", gzip.compress), ("textvqa", bz2.compress), ("llava", lzma.compress)]
)
def test_files_that_are_still_packed_are_told_at_once(
    tmp_path: Path, format: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "rows.json").write_bytes(pack(b"[{}]"))
    with pytest.raises(
        DataError, match=r"rows\.json: a (gzip|bzip2|xz) file, expected plain content; unpack or convert"
    ):
        open_files(format, Files(tmp_path / "rows.json"))


def test_files_that_are_not_there_or_empty_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such file or directory"):
        open_files("llava", Files(tmp_path / "none.json"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no samples in it"):
        open_files("llava", Files(tmp_path / "empty.jsonl"))
    with pytest.raises(ConfigError, match="unknown format 'lava'; did you mean 'llava'"):
        open_files("lava", Files(tmp_path / "empty.jsonl"))
    (tmp_path / "q.json").write_text('{"questions": []}')
    with pytest.raises(ConfigError, match="a second file of annotations; none is named"):
        open_files("vqa", Files(tmp_path / "q.json"))
    with pytest.raises(DataError, match=r"q\.json: 'data' is missing"):
        open_files("textvqa", Files(tmp_path / "q.json"))


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    "image, told",
    [
        ("../secret.png", r"\.\./secret\.png: leads out of"),
        ("/etc/passwd", "/etc/passwd: leads out of"),
        ("link.png", r"link\.png: leads out of"),
        ("http://example.com/a.png", "an address, expected a path; nothing is fetched"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("data:image/png,red", "a data URL that is not base64"),
        ("data:image/png;base64,@@@@", "a data URL that is not base64"),
        ("data:image/png;base64,aGVsbG8=", "a data URL: not a picture"),
        ("none.png", r"none\.png: no such file"),
        ("rows.jsonl", r"rows\.jsonl: not a picture"),
        ("cut.png", "the PNG data is damaged or cut off"),
        ("a\0b.png", "no such file"),
        ("x" * 5000, "no such file|cannot be read"),
        ("", "not a regular file"),
        (7, "7 for a picture, expected a path or a data URL"),
    ],
)
def test_a_picture_that_cannot_be_had_is_named_with_its_line(folder: Path, write: Write, image: Any, told: str) -> None:
    PIL.Image.new("RGB", (9, 9)).save(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    noise.save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-900])
    reader = open_files("llava", Files(write("rows.jsonl", [llava(), llava(image=image), llava()])))
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*({told})"):
        reader[1]
    assert reader[0] == reader[2]


def test_pictures_may_lie_in_another_folder(folder: Path, write: Write) -> None:
    path = write("rows.jsonl", [llava(image="black.png")])
    assert open_files("llava", Files(path, images=folder / "below"))[0].conversation[0].parts[0]


# ------------------------------------------------------------------------------------------------- whatever a row says

COCO = {
    "images": [{"id": 1, "file_name": "red.png", "width": 40, "height": 20, "caption": "it"}],
    "annotations": [{"id": 5, "image_id": 1, "bbox": [1, 2, 10, 10], "category_id": 3, "iscrowd": 0}],
    "categories": [{"id": 3, "name": "dog"}],
}
RATED = {name: {"Rating": "4"} for name in ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")}
WORSE = {**RATED, "Helpfulness": {"Rating": "1"}}
ROWS: dict[str, Any] = {
    "llava": [llava(), {**llava("<video> what?"), "image": None, "video": "film", "fps": 2}],
    "openai": [
        {
            "messages": [
                {"role": "system", "content": "be short"},
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "red.png"}}, {"type": "text", "text": "?"}],
                },
                {"role": "assistant", "content": "red"},
            ]
        }
    ],
    "rlhf-v": [{"image": "red.png", "text": '{"question": "a?", "chosen": "b", "rejected": "c"}'}],
    "vlfeedback": [
        {
            "image": "red.png",
            "prompt": "what?",
            "completions": [{"response": "a", "annotations": RATED}, {"response": "b", "annotations": WORSE}],
        }
    ],
    "llava-pairs": [{**llava(), "output_1": {"value": "a"}, "output_2": {"value": "b"}, "preference": 2}],
    "openai-pairs": [
        {
            "input": {"messages": [{"role": "user", "content": "?"}]},
            "preferred_output": [{"role": "assistant", "content": "red"}],
            "non_preferred_output": [{"role": "assistant", "content": "blue"}],
        }
    ],
    "textvqa": {"data": [{"question_id": 4, "question": "?", "image_id": "red", "answers": ["a", "b", "b"]}]},
    "gqa": {"07": {"imageId": "red", "question": "?", "answer": "yes"}},
    "coco": COCO,
    "refcoco": COCO,
}
ODD = [None, True, 0, -1, 1e400, float("nan"), "", " ", "x", "\ud800", [], {}, [None], {"x": 1}, [[1]], "../a.png"]


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        for rest in places(inner):
            yield (key, *rest)


def told(format: str, files: Files) -> Iterator[bool]:
    """Whether each sample of a data set is refused, and that it is done in one line that names it."""
    try:
        reader = open_files(format, files)
    except DataError as error:
        yield str(files.path) in str(error) and "\n" not in str(error)
        return
    for i in range(len(reader)):
        try:
            record = reader[i]
        except DataError as error:
            yield str(error).startswith(str(files.path)) and "\n" not in str(error)
        else:
            assert isinstance(record, Record)


@pytest.mark.parametrize("format", ROWS)
def test_whatever_stands_anywhere_in_a_row_it_is_read_or_refused_in_one_line(
    folder: Path, write: Write, format: str
) -> None:
    PIL.Image.new("RGB", (40, 20), "red").save(folder / "red.jpg")
    refused = 0
    for place in places(ROWS[format]):
        for odd in ODD:
            content = here = copy.deepcopy(ROWS[format])
            for key in place[:-1]:
                here = here[key]
            here[place[-1]] = odd
            found = list(told(format, Files(write("rows.json", content))))
            assert all(found)
            refused += len(found)
    assert refused > 20


def test_every_format_is_tried_with_odd_values_or_has_its_own_test() -> None:
    assert set(FORMATS) - set(ROWS) == {"shards", "vqa"}


def test_no_member_of_an_archive_is_more_than_bytes(folder: Path, tmp_path: Path) -> None:
    """Links, devices, names that lead out, sizes beyond the file: nothing is opened or written."""
    picture = (folder / "red.png").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in [("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("dev", tarfile.CHRTYPE)]:
            member = tarfile.TarInfo(f"{name}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name, data in [("../../out.png", picture), ("../../out.txt", b"words"), ("/abs.png", picture)]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    before = sorted(folder.rglob("*"))
    reader = open_files("shards", Files(tmp_path / "a.tar"))
    assert len(reader) == 2
    assert reader[0].conversation[1].text == "words"
    with pytest.raises(DataError, match="no caption"):
        reader[1]
    assert sorted(folder.rglob("*")) == before
