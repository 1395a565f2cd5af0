"""The command line: what each verb prints, and one clear line with exit code 2 for everything that cannot be used."""

import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from sightline import cli
from sightline.cli import app, clean


class Done:
    """How a run of the program ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def run(*words: object, stdin: bytes | str = b"") -> Done:
    """The program, inside this process."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def program(*words: object, **more: Any) -> Done:
    """The program as a process of its own."""
    command = [sys.executable, "-m", "sightline", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    return Done(done.returncode, done.stdout, done.stderr)


def refused(done: Done) -> str:
    """The one line of an error."""
    assert done.code == 2, done.err
    assert done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture
def model(tiny_folder: Path) -> tuple[str, ...]:
    return "--model", str(tiny_folder), "--max-tokens", "6"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise = np.random.default_rng(3).integers(0, 255, (30, 48, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def png_header(width: int, height: int, depth: int = 1) -> bytes:
    """A small PNG of one colour whose header promises a large picture: what unpacks to far more than it takes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(1 << 20), 9)
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# --------------------------------------------------------------------------------------------------------------- ask


def test_ask_prints_the_answer_and_tells_its_cost_apart(model: tuple[str, ...], picture: Path) -> None:
    done = run("ask", picture, "how many?", *model)
    assert done.code == 0
    assert done.out.strip()
    assert re.fullmatch(r"confidence \d+%, 16 image and \d+ text tokens read, \d+ written, \d+\.\d\d s\n", done.err)


def test_ask_as_json(model: tuple[str, ...], picture: Path) -> None:
    done = run("ask", picture, "how many?", "--json", *model)
    answer = json.loads(done.out)
    assert done.err == ""
    assert list(answer) == ["text", "boxes", "points", "confidence", "usage", "timing"]
    assert set(answer["usage"]) == {"image_tokens", "prompt_tokens", "completion_tokens"}
    assert answer["usage"]["completion_tokens"] <= 6


def test_what_is_printed_as_it_comes_is_what_json_says(model: tuple[str, ...], picture: Path) -> None:
    for seed in range(4):
        words = ("ask", picture, "how many?", "--temperature", 2, "--seed", seed, *model)
        said = json.loads(run(*words, "--json").out)
        first = run(*words).out.splitlines()
        assert "\n".join(first[: len(first) - len(said["boxes"]) - len(said["points"])]) == clean(said["text"])


def test_the_same_seed_draws_the_same(model: tuple[str, ...], picture: Path) -> None:
    texts = [
        json.loads(run("ask", picture, "how many?", "--json", "--temperature", 1.5, "--seed", seed, *model).out)["text"]
        for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_several_pictures_and_stdin(model: tuple[str, ...], picture: Path) -> None:
    one = json.loads(run("ask", "-", "how many?", "--json", *model, stdin=picture.read_bytes()).out)
    same = json.loads(run("ask", picture, "how many?", "--json", *model).out)
    assert one["text"] == same["text"]
    two = json.loads(run("ask", picture, picture, "how many?", "--json", *model).out)
    assert two["usage"]["image_tokens"] == 2 * one["usage"]["image_tokens"]


def test_a_stop_text_ends_the_answer(model: tuple[str, ...], picture: Path) -> None:
    words = ("ask", picture, "how many?", "--json", "--temperature", 2, "--seed", 2, *model)
    text = json.loads(run(*words).out)["text"]
    middle = text[len(text) // 2]
    assert middle not in json.loads(run(*words, "--stop", middle).out)["text"]


class Scripted:
    """Chooses the tokens of a given text instead of the model's."""

    ids: list[int]

    def __init__(self, sampling: Any) -> None:
        self.sampling, self.left = sampling, iter(self.ids)

    def __call__(self, logits: Any) -> tuple[int, float]:
        return next(self.left), 0.9


def test_places_are_printed_and_drawn(
    tiny_folder: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sightline.language.tokenizer import Tokenizer

    text = " red circle<box><loc000><loc000><loc063><loc127> star<point><loc064><loc064><eos>"
    Scripted.ids = Tokenizer.from_folder(tiny_folder).trusted(text)
    monkeypatch.setattr("sightline.serving.engine.Chooser", Scripted)
    out = tmp_path / "drawn.png"
    done = run("ask", picture, "where?", "--model", tiny_folder, "--draw", out)
    assert done.out == "red circle, star\n  red circle  [0, 0, 24, 30]  90%\n  star  [24, 15]  90%\n"
    assert done.err.startswith("confidence 90%, ")
    before, after = np.asarray(PIL.Image.open(picture)), np.asarray(PIL.Image.open(out))
    assert before.shape == after.shape
    assert np.any(before[:, :24] != after[:, :24])


def test_a_terminal_cannot_be_steered() -> None:
    assert clean("red\x1b[2Jblue\r\x07\nnext") == "red [2Jblue  \nnext"


# --------------------------------------------------------------------------------------------- pictures that are fine


def saved(folder: Path, kind: str) -> Path:
    """A picture of an unusual kind that must be read all the same."""
    base = PIL.Image.new("RGB", (40, 24), (200, 30, 30))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = folder / f"{kind}.{'jpg' if kind in ('cmyk', 'exif') else 'png'}"
    if kind == "exif":
        base.save(path, exif=exif)
    elif kind == "palette":
        base.convert("P").save(path)
    elif kind == "16-bit":
        PIL.Image.fromarray(np.full((24, 40), 40_000, np.uint16)).save(path)
    elif kind == "cmyk":
        base.convert("CMYK").save(path)
    elif kind == "alpha":
        base.convert("RGBA").save(path)
    else:
        width, height = map(int, kind.split("x"))
        PIL.Image.new("RGB", (width, height), "red").save(path)
    return path


@pytest.mark.parametrize("kind", ["palette", "16-bit", "cmyk", "alpha", "exif", "1x1", "1x20000", "20000x1"])
def test_unusual_pictures_are_read(kind: str, model: tuple[str, ...], tmp_path: Path) -> None:
    path, drawn = saved(tmp_path, kind), tmp_path / "drawn.png"
    done = run("ask", path, "how many?", "--json", "--draw", drawn, *model)
    assert done.code == 0, done.err
    assert json.loads(done.out)["usage"]["image_tokens"] == 16
    width, height = PIL.Image.open(path).size
    assert PIL.Image.open(drawn).size == ((height, width) if kind == "exif" else (width, height))


def test_a_film_is_asked_about_by_its_frames(model: tuple[str, ...], tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{i}.png")
    for source in ("clip.gif", "frames"):
        done = run("ask", tmp_path / source, "what happens?", "--json", *model)
        assert done.code == 0, done.err
        assert json.loads(done.out)["usage"]["image_tokens"] == 3 * 16


# ---------------------------------------------------------------------------------------------------------- bad input


def test_missing_file(model: tuple[str, ...]) -> None:
    assert refused(run("ask", "none.png", "how many?", *model)) == "none.png: no such file"


def test_a_folder_is_no_picture(model: tuple[str, ...], tmp_path: Path) -> None:
    assert "not a regular file" in refused(run("ask", tmp_path, "how many?", *model))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # `main` keeps it off the terminal
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty, expected a picture"),
        (b"not a picture at all", "not a picture; expected JPEG, PNG, WEBP, GIF, BMP"),
        (png_header(9000, 9000), "9000x9000 pixels, at most 33.2 megapixels"),
        (png_header(60_000, 60_000), "far too large, at most 33.2 megapixels"),
        (png_header(10_001, 10_000), "10001x10000 pixels, at most 33.2 megapixels"),
        (png_header(1, 40_000), "at most 33.2 megapixels and 30000 pixels a side"),
        (png_header(4000, 4000), "the PNG data is damaged or cut off"),
    ],
    ids=["empty", "text", "9000", "60000", "10001", "side", "short"],
)
def test_what_is_no_picture(data: bytes, message: str, model: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "given.png"
    path.write_bytes(data)
    assert message in refused(run("ask", path, "how many?", *model))
    if data:
        assert message in refused(run("ask", "-", "how many?", *model, stdin=data))


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_truncated_jpeg(share: float, model: tuple[str, ...], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    packed = io.BytesIO()
    PIL.Image.fromarray(noise).save(packed, "JPEG")
    path = tmp_path / "cut.jpg"
    path.write_bytes(packed.getvalue()[: round(len(packed.getvalue()) * share)])
    message = refused(run("ask", path, "how many?", *model))
    assert re.search("damaged or cut off|not a picture", message)


def test_nothing_on_stdin(model: tuple[str, ...]) -> None:
    assert refused(run("ask", "-", "how many?", *model)) == "stdin is empty, expected the bytes of a picture"


def test_an_empty_name_is_not_the_default_model(picture: Path) -> None:
    assert "the name of the model is empty" in refused(run("ask", picture, "how many?", "--model", ""))
    assert "the name of the model is empty" in refused(run("show", ""))


def test_a_picture_is_no_file_of_questions(model: tuple[str, ...], picture: Path, tmp_path: Path) -> None:
    message = refused(run("answer", picture, "--out", tmp_path / "a.jsonl", *model))
    assert message == f"{picture}: no line is a row of questions, expected JSON objects, one a line"
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("question", ["", "  \t"])
def test_empty_question(question: str, model: tuple[str, ...], picture: Path) -> None:
    assert refused(run("ask", picture, question, *model)) == "the question is empty, expected some words"


def test_a_question_without_a_picture(model: tuple[str, ...]) -> None:
    assert refused(run("ask", "how many?", *model)) == "found only 'how many?', expected a picture and a question"


def test_a_question_longer_than_the_context(model: tuple[str, ...], picture: Path) -> None:
    message = refused(run("ask", picture, "circle " * 400, *model))
    assert re.fullmatch(r"\d+ tokens \(16 of images\) for a context of 256; shorten the text", message)


def test_unknown_model(picture: Path) -> None:
    message = refused(run("ask", picture, "how many?", "--model", "llava-1.5-7p"))
    assert message == "no model and no folder 'llava-1.5-7p'; did you mean 'llava-1.5-7b'?"
    assert "did you mean 'llava-1.5-7b'?" in refused(run("show", "lava-1.5-7b"))
    assert "give the folder that holds llava-hf" in refused(run("ask", picture, "x", "--model", "llava-1.5-7b"))


def test_a_folder_that_is_no_model(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(run("ask", picture, "how many?", "--model", tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llavva"}')
    assert "did you mean 'llava'" in refused(run("ask", picture, "how many?", "--model", tmp_path / "empty"))


def test_corrupted_weights(tiny_folder: Path, picture: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in tiny_folder.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    weights = bytearray((bad / "model.safetensors").read_bytes())
    weights[-100] ^= 8
    (bad / "model.safetensors").write_bytes(weights)
    assert "model.safetensors: the content differs from its sha256" in refused(run("ask", picture, "x", "-m", bad))
    (bad / "model.safetensors").write_bytes(weights[:-50])
    assert re.search(r"\d+ bytes, expected \d+", refused(run("ask", picture, "x", "-m", bad)))
    (bad / "model.safetensors").unlink()
    assert "model.safetensors: missing" in refused(run("ask", picture, "x", "-m", bad))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", "-1"), "temperature is -1.0, expected 0 (greedy) to 100"),
        (("--temperature", "nan"), "temperature is nan, expected 0 (greedy) to 100"),
        (("--top-p", "0"), "top_p is 0.0, expected above 0 and at most 1"),
        (("--max-tokens", "0"), "max_new_tokens is 0, expected a whole number of at least 1"),
        (("--stop", ""), "a stop text is empty, expected some letters"),
        (("--seed", "red"), "Invalid value for '--seed'"),
        (("--sed", "3"), "No such option: --sed"),
    ],
)
def test_settings_that_make_no_sense(words: tuple[str, str], message: str, tiny_folder: Path, picture: Path) -> None:
    assert message in refused(run("ask", picture, "how many?", "--model", tiny_folder, *words))


def test_a_drawing_that_cannot_be_written(tiny_folder: Path, picture: Path, tmp_path: Path) -> None:
    words = ("ask", picture, "how many?", "--model", tiny_folder, "--draw")
    assert "drawn.png: its folder does not exist" in refused(run(*words, tmp_path / "none" / "drawn.png"))
    assert "drawn.xyz: a drawing cannot be of the kind '.xyz'" in refused(run(*words, tmp_path / "drawn.xyz"))
    (tmp_path / "taken.png").mkdir()
    done = run(*words, tmp_path / "taken.png")
    assert done.code == 2
    assert "taken.png: is a directory" in done.err


def test_unknown_verbs_recipes_stages_keys_and_worlds() -> None:
    assert "No such command 'aks'" in refused(run("aks"))
    assert refused(run("train", "sightline-mimi")) == "unknown recipe 'sightline-mimi'; did you mean 'sightline-mini'?"
    assert "unknown key 'stpes'; did you mean 'steps'?" in refused(run("train", "sightline-mini", "stages.0.stpes=3"))
    assert "no stage 'algin'; did you mean 'align'?" in refused(
        run("train", "sightline-mini", "--stage", "algin", "--dry-run")
    )
    assert "matches no parameter" in refused(
        run("train", "sightline-mini", "stages.2.learn={fushion.*: 0.1}", "--dry-run")
    )
    assert (
        refused(run("compare", "tiny", "--fusion", "mlp,lineer")) == "unknown fusion 'lineer'; did you mean 'linear'?"
    )
    assert "0 seeds" in refused(run("compare", "tiny", "--seeds", "0"))
    assert "unknown world 'scene'; did you mean 'scenes'?" in refused(run("render", "scene"))


def test_a_recipe_file_of_one_s_own(tmp_path: Path) -> None:
    """What it says counts, the rest comes from its base; a wrong key is told with the nearest."""
    path = tmp_path / "mine.yaml"

    def told(*lines: str) -> str:
        path.write_text("\n".join(lines))
        return refused(run("train", path, "--dry-run"))

    base, source = "base: sightline-mini", "sources: {mine: {kind: conversations, format: llava}}"
    stage = "stages: [{name: align, learn: {fusion.*: 0.001}, data: {mine: 1}, steps: 3}]"
    assert "key 'model' is missing from Recipe" in told(source, stage)
    assert "unknown key 'sorces'; did you mean 'sources'?" in told(base, "sorces: {}")
    assert "unknown recipe 'sightline-mimi'; did you mean 'sightline-mini'?" in told("base: sightline-mimi")
    assert "unknown key 'stages.0.lern'; did you mean 'learn'?" in told(base, source, stage.replace("learn", "lern"))
    assert "unknown format 'lava'; did you mean 'llava'?" in told(base, source.replace("llava", "lava"), stage)
    assert "has no source 'mine'; did you mean 'mein'?" in told(base, source.replace("mine:", "mein:"), stage)
    assert "expected keys and values, found [1, 2]" in told("[1, 2]")
    path.write_text("\n".join((base, source, stage)))
    planned = run("train", path, "--dry-run", "stages.0.steps=7")  # without its files it can be looked at
    assert planned.code == 0 and planned.out.startswith("mine: ") and "7 of 16 samples" in planned.out
    folder = tmp_path / "run"
    begin = ("train", path, "start=sightline-mini", "--folder", folder)
    assert "source 'mine' names no file; set sources.mine.path=FILE" in refused(run(*begin))
    assert "none.json: no such file or directory" in refused(run(*begin, "sources.mine.path=none.json"))
    (tmp_path / "mine.json").write_text('{"base": "sightline-mini"}')
    assert run("train", tmp_path / "mine.json", "--dry-run").out.startswith("mine: ")
    assert "gone.yaml" in refused(run("train", tmp_path / "gone.yaml"))


def test_a_run_that_was_asked_to_stop_says_so_in_its_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sightline.training.run.run", lambda *given, **more: sys.exit(143))
    assert run("train", "tiny", "--folder", tmp_path).code == 143


def test_a_mistake_in_a_later_stage_is_told_before_the_first_begins(tmp_path: Path) -> None:
    """A pattern, a template, a file: nothing is written, and the run can begin once it is right."""
    folder = tmp_path / "run"
    rows = "{kind: conversations, format: llava, path: none.json}"
    stage = "{name: NAME, learn: {'decoder.*': 0.1}, data: {pairs: 1}, steps: 1}"
    path = tmp_path / "two.yaml"
    for wrong, told in (
        (stage.replace("decoder", "decodr"), "pattern 'decodr.*' matches no parameter; did you mean 'decoder.*'?"),
        (stage.replace("steps", "template: lava, steps"), "unknown template 'lava'; did you mean 'llava-v1'?"),
        (stage.replace("pairs", "rows"), "none.json: no such file or directory"),
    ):
        stages = ", ".join((stage.replace("NAME", "first"), wrong.replace("NAME", "second")))
        path.write_text(f"base: tiny\nstages: [{stages}]\nsources: {{pairs: {{kind: plain}}, rows: {rows}}}")
        assert refused(run("train", path, "--folder", folder)) == told
        assert not folder.exists()


def test_a_name_with_line_breaks_is_still_one_line(model: tuple[str, ...]) -> None:
    assert refused(run("ask", "a\nb\x1b[0m.png", "how many?", *model)) == "a?b?[0m.png: no such file"


# ----------------------------------------------------------------------------------------------------- the other verbs


def test_chat_remembers(model: tuple[str, ...], picture: Path) -> None:
    done = run("chat", picture, *model, stdin="how many?\nwhere?\n\nnot read")
    assert done.code == 0
    text = [int(number) for number in re.findall(r"16 image and (\d+) text", done.err)]
    assert len(text) == 2
    assert text[1] > text[0]


def test_chat_tells_bad_pictures_before_it_begins(model: tuple[str, ...]) -> None:
    assert refused(run("chat", "none.png", *model, stdin="hi")) == "none.png: no such file"


def test_answer_resumes(model: tuple[str, ...], picture: Path, tmp_path: Path) -> None:
    rows = [{"image": "noise.png", "question": f"how many? {i}"} for i in range(3)] + [
        {"image": "x.png", "question": "?"}
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "a.jsonl"
    done = run("answer", tmp_path / "q.jsonl", "--out", out, *model)
    assert (done.code, done.out) == (0, "")
    assert done.err == f"{out}: 4 rows, 1 with an error\n"
    assert [("answer" in row, "error" in row) for row in map(json.loads, out.read_text().splitlines())] == [
        (True, False)
    ] * 3 + [(False, True)]
    again = run("answer", tmp_path / "q.jsonl", "--out", out, *model)
    assert again.err == f"{out}: 4 rows, 4 were there before, 0 with an error\n"
    assert "expected a file of questions" in refused(run("answer", tmp_path / "none.jsonl", "--out", out, *model))


def test_models_lists_what_can_be_loaded() -> None:
    done = run("models")
    assert re.search(
        r"^llava-1\.5-7b +7\.06 G +CLIP ViT-L/14 336 → MLP of 2 layers → Vicuna 7B v1\.5\n"
        r"    LLaVA-1\.5; licence Llama 2; llava-hf/llava-1\.5-7b-hf at b234b804b114; not here\n    logits, gre",
        done.out,
        re.M,
    )
    assert max(map(len, done.out.splitlines())) <= 100
    rows = json.loads(run("models", "--json").out)
    keys = "name family encoder fusion llm parameters licence source proof revision here"
    assert set(keys.split()) == set(rows[0])


def test_nobody_reads_on() -> None:
    """As after `| head`: quiet, and no error."""
    for words in ("models --json", "models", "show llava-1.5-7b", "--help"):
        command = f"{sys.executable} -m sightline {words}"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} | (exec 0<&-; sleep 0.1)"], capture_output=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), words


def test_show_needs_no_weights(tiny_folder: Path) -> None:
    assert "576 visual tokens" in run("show", "llava-1.5-7b").out
    described = json.loads(run("show", tiny_folder, "--json").out)
    assert described["visual_tokens"] == 16
    assert set(described["trained"]) == {"align", "instruct"}


def test_show_tells_the_tokens_of_a_picture() -> None:
    assert "1792 visual tokens a picture" in run("show", "internvl-chat-v1-5", "--size", "1344x896").out
    assert "expected width and height such as 1344x896" in refused(run("show", "aria", "--size", "1344"))
    assert "a picture of 0x3 pixels" in refused(run("show", "aria", "--size", "0x3"))


def test_convert_says_what_does_not_fit_and_writes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    message = refused(run("convert", tiny_folder, tmp_path / "out"))
    assert message.startswith("it does not fit LLaVA's layout: image.stem is (8, 16), expected ()")
    assert "did you mean 'llava'?" in refused(run("convert", tiny_folder, tmp_path / "out", "--to", "lava"))
    assert "own layout already" in refused(run("convert", tiny_folder, tmp_path / "out", "--to", "sightline"))
    assert list(tmp_path.iterdir()) == []


def test_pull_refuses_what_has_no_weights() -> None:
    assert "did you mean 'llava-1.5-7b'?" in refused(run("pull", "llava-1.5-7c"))


def test_train_tells_its_plan() -> None:
    done = run("train", "sightline-mini", "stages.1.steps=7", "--dry-run", "--stage", "language")
    assert done.code == 0
    assert "steps      7 of 8 samples" in done.out
    assert "decoder.* at 0.001" in done.out
    assert "encoder.*" not in done.out


def test_train_tells_what_a_published_recipe_takes_and_which_files_it_is_missing(tmp_path: Path) -> None:
    words = ("train", "llava-1.5-7b", "--stage", "align")
    done = run(*words, "--dry-run")
    assert "learns     21.0 M of 7.06 G parameters" in done.out
    assert "576 tokens of pictures" in done.out
    assert "sources.lcs_558k.path=FILE is still to be given" in done.out
    told = refused(run(*words, "--folder", tmp_path / "run"))
    assert told.startswith("source 'lcs_558k' names no file; set sources.lcs_558k.path=FILE, conversations in")


def test_render_writes_pictures_and_questions(tmp_path: Path) -> None:
    done = run("render", "scenes", "--count", 2, "--out", tmp_path / "scenes", "--seed", 5)
    assert done.out.strip() == str(tmp_path / "scenes" / "data.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "scenes" / "data.jsonl").read_text().splitlines()]
    assert {row["image"] for row in rows} == {"images/00000005.png", "images/00000006.png"}
    assert "count is 0" in refused(run("render", "scenes", "--count", 0, "--out", tmp_path / "none"))


# -------------------------------------------------------------------------------------------------- as people run it


def test_as_a_process(tiny_folder: Path, picture: Path) -> None:
    done = program("ask", picture, "how many?", "--json", "--model", tiny_folder)
    assert done.code == 0, done.err
    assert json.loads(done.out)["usage"]["image_tokens"] == 16
    assert refused(program("ask", picture.parent / "none.png", "how many?")).endswith("none.png: no such file")
    assert program().out.startswith("Usage: ")
    assert program("--version").out.strip()


def test_a_bomb_is_refused_in_little_memory(picture: Path, tiny_folder: Path) -> None:
    """From the header: unpacked it would take 240 MB, and the warning of the library below stays off the terminal."""
    bomb = picture.parent / "bomb.png"
    bomb.write_bytes(png_header(10_000, 10_000, depth=8))
    assert "10000x10000 pixels" in refused(program("ask", bomb, "how many?", "--model", tiny_folder))


def test_a_reader_that_goes_away_is_no_error(tiny_folder: Path) -> None:
    shell = f"{sys.executable} -m sightline models | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_a_full_disk_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "x.png", "question": "?"}) + "\n")
    shell = f"ulimit -f 0; exec {sys.executable} -m sightline answer q.jsonl --out a.jsonl --model {tiny_folder}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: writing: file too large\n"


def test_a_terminal_shows_the_prompt_of_a_chat(tiny_folder: Path, picture: Path) -> None:
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "sightline",
        "chat",
        str(picture),
        "--model",
        str(tiny_folder),
        "--max-tokens",
        "2",
    ]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as chat:
        os.write(ours, b"how many?\n\n")
        _, told = chat.communicate(timeout=60)
    assert chat.returncode == 0
    assert told.count("> ") == 2


def test_without_a_terminal_a_line_now_and_then_tells_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with cli._progress("training") as progress:
        for seconds, done, total in [(10, 100, 1000), (50, 200, 1000), (60, 300, 1000), (100, 1, 50), (110, 6, 50)]:
            now[0] = seconds
            progress(done, total, "look")
    assert capsys.readouterr().err.splitlines() == [
        "look: 200 of 1000, 0:05:20 left",
        "look: 1 of 50",
    ]
