"""The object that people hold: pictures in any form, answers as values, places in pixels of the upright original."""

import io
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import sightline
from sightline import Answer, Assistant, Box, CapacityError, Frame, InputError, Message, Point, Sampling, Text
from sightline.core.sequence import Conversation, Image, Region
from sightline.data.media import open_image
from sightline.serving.assistant import place_confidences
from sightline.serving.engine import Reply
from sightline.serving.talker import conversation


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Assistant:
    return sightline.load(tiny_folder)


@pytest.fixture
def picture() -> PIL.Image.Image:
    noise = np.random.default_rng(3).integers(0, 255, (30, 48, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise)


def said_by(model: Assistant, text: str, talk: Conversation) -> Reply:
    """The reply of an engine whose model wrote this text, control tokens by name."""
    processor = model.engine.processor
    ids = tuple(processor.tokenizer.trusted(text))
    probabilities = tuple(1 / (2 + i) for i in range(len(ids)))
    return Reply(ids, processor.read(ids, processor(talk).transforms), probabilities, 0.5, {}, {})


class Wrote:
    """An engine whose model always writes the same."""

    def __init__(self, model: Assistant, text: str) -> None:
        self.assistant, self.text, self.processor = model, text, model.engine.processor
        self.model = model.published.runner

    def answer(self, talks: Sequence[Conversation], sampling: Any) -> list[Reply]:
        return [said_by(self.assistant, self.text, talk) for talk in talks]


def test_a_picture_may_come_in_any_form(model: Assistant, picture: PIL.Image.Image, tmp_path: Path) -> None:
    path, packed = tmp_path / "noise.png", io.BytesIO()
    picture.save(path)
    picture.save(packed, "PNG")
    forms = (path, str(path), packed.getvalue(), picture, np.asarray(picture), Image(picture), [picture])
    answers = [model.ask(form, "how many?", max_new_tokens=8, temperature=1.0, seed=5) for form in forms]
    assert len({(answer.text, answer.confidence) for answer in answers}) == 1
    assert answers[0].usage["completion_tokens"] > 1


def test_several_pictures_and_none(model: Assistant, picture: PIL.Image.Image) -> None:
    two = model.ask([picture, picture], "how many?", max_new_tokens=2)
    none = model.ask(None, "how many?", max_new_tokens=2)
    assert two.usage["image_tokens"] == 32
    assert none.usage["image_tokens"] == 0
    assert two.usage["prompt_tokens"] == none.usage["prompt_tokens"] + 32


def test_the_answer_depends_on_the_picture(model: Assistant, picture: PIL.Image.Image) -> None:
    black = PIL.Image.new("RGB", (48, 30))
    assert model.ask(picture, "how many?", max_new_tokens=1).confidence != pytest.approx(
        model.ask(black, "how many?", max_new_tokens=1).confidence
    )


def test_an_answer_as_json(model: Assistant, picture: PIL.Image.Image) -> None:
    frame = Frame(48, 30)
    box, point = Box(1.234, 2, 3, 4, frame, "cat", 0.75), Point(5, 6.789, frame, "dog", 0.12345)
    answer = Answer("cat, dog", (box,), (point,), 0.98765, {"image_tokens": 4}, {"total": 0.1})
    assert answer.to_dict() == {
        "text": "cat, dog",
        "boxes": [{"label": "cat", "xyxy": [1.23, 2, 3, 4], "confidence": 0.75}],
        "points": [{"label": "dog", "xy": [5, 6.79], "confidence": 0.1235}],
        "confidence": 0.9877,
        "usage": {"image_tokens": 4},
        "timing": {"total": 0.1},
    }
    real = model.ask(picture, "how many?", max_new_tokens=3).to_dict()
    assert set(real) == {"text", "boxes", "points", "confidence", "usage", "timing"}
    assert set(real["usage"]) == {"image_tokens", "prompt_tokens", "completion_tokens"}
    assert 0 < real["timing"]["first_token"] <= real["timing"]["total"]
    assert 0 < real["confidence"] <= 1


def test_boxes_are_in_pixels_of_the_upright_original(
    model: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 100x50 file whose EXIF says that it is to be turned: what people see is 50 wide and 100 high."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (100, 50)).save(tmp_path / "turned.jpg", exif=exif)
    monkeypatch.setattr(model, "_engine", Wrote(model, " red circle<box><loc000><loc000><loc063><loc127>"))
    answer = model.ask(tmp_path / "turned.jpg", "where?")
    assert answer.text == "red circle"
    assert answer.boxes[0].frame == Frame(50, 100)
    assert answer.boxes[0].label == "red circle"
    half = 0.5 / 128
    assert answer.boxes[0].xyxy == pytest.approx((50 * half, 100 * half, 50 * (0.5 - half), 100 * (1 - half)))


def test_a_place_is_as_sure_as_the_tokens_that_wrote_it(model: Assistant, picture: PIL.Image.Image) -> None:
    talk = conversation(picture, "where?")
    one = " red<box><loc000><loc001><loc002><loc003>"
    first = len(model.engine.processor.tokenizer.trusted(one))
    reply = said_by(model, one + " blue<point><loc000><loc001> and so on", talk)
    second = len(model.engine.processor.tokenizer.trusted(" blue<point><loc000><loc001>"))
    sure = [1 / (2 + i) for i in range(first + second)]
    assert place_confidences(reply, model.engine.processor) == {
        Box: [pytest.approx(math.fsum(sure[:first]) / first)],
        Point: [pytest.approx(math.fsum(sure[first:]) / second)],
    }


def test_an_answer_handed_back_reads_as_it_was_written(model: Assistant, picture: PIL.Image.Image) -> None:
    """The next turn of a chat sees the ids that the model wrote, places included."""
    processor = model.engine.processor
    talk = conversation(picture, "where?")
    text = " red circle<box><loc010><loc020><loc030><loc040> star<point><loc007><loc099>"
    reply = said_by(model, text, talk)
    answer = Answer(reply.grounded.text, reply.grounded.boxes, reply.grounded.points)
    message = model.said(answer)
    assert [type(part) for part in message.parts] == [Region, Region]
    example = processor((*talk, message))
    written = [i for i, learned in zip(example.ids.tolist()[1:], example.labels.tolist(), strict=False) if learned >= 0]
    assert written == [*reply.ids, processor.tokenizer.control("<eos>")]


def test_plain_answers_are_handed_back_as_text(model: Assistant) -> None:
    assert model.said(Answer("three")) == Message("assistant", (Text("three"),))


@pytest.mark.parametrize("seed", range(6))
def test_the_pieces_of_a_stream_are_the_answer(model: Assistant, picture: PIL.Image.Image, seed: int) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 24, "temperature": 2.0, "seed": seed}
    stream = model.stream(picture, "how many?", **settings)
    pieces = list(stream)
    asked = model.ask(picture, "how many?", **settings)
    assert stream.answer.text == asked.text
    assert "".join(pieces) == asked.text
    assert stream.answer.usage == asked.usage


def test_a_conversation_goes_on(model: Assistant, picture: PIL.Image.Image) -> None:
    first = conversation(picture, "how many?")
    answer = model.chat(first, max_new_tokens=3)
    second = model.chat((*first, model.said(answer), Message("user", (Text("where?"),))), max_new_tokens=3)
    assert second.usage["prompt_tokens"] > answer.usage["prompt_tokens"] + 3
    with pytest.raises(InputError, match="message 2 is from the user, expected the assistant"):
        model.chat((*first, *first))


def test_detect_asks_in_the_model_s_own_way(
    model: Assistant, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_engine", engine := Wrote(model, " cat<box><loc000><loc001><loc002><loc003>"))
    asked: list[str] = []
    monkeypatch.setattr(
        engine,
        "answer",
        lambda talks, sampling: (
            asked.extend(talk[0].text for talk in talks) or [said_by(model, engine.text, talk) for talk in talks]
        ),
    )
    assert [box.label for box in model.detect(picture, " red cat ").boxes] == ["cat"]
    assert asked == ["Locate every red cat."]
    with pytest.raises(InputError, match="the phrase is empty"):
        model.detect(picture, " ")


def test_a_place_without_a_name_is_named_by_the_phrase(
    model: Assistant, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = "<box><loc000><loc001><loc002><loc003><point><loc000><loc001>"
    monkeypatch.setattr(model, "_engine", Wrote(model, places))
    found = model.detect(picture, "red cat")
    assert [place.label for place in (*found.boxes, *found.points)] == ["red cat", "red cat"]


def test_many_at_once_are_as_one_by_one(model: Assistant, picture: PIL.Image.Image) -> None:
    """Shared pictures, single pictures and lengths are mixed; greedy tokens are equal in float32."""
    other = PIL.Image.new("RGB", (20, 20), "blue")
    talks = [
        conversation(seen, question)
        for seen in (picture, other, None)
        for question in ("how many?", "where is the blue square? " * 3, "yes")
    ]
    sampling = Sampling(max_new_tokens=12)
    together = model.answer(talks, sampling)
    alone = [model.chat(talk, max_new_tokens=12) for talk in talks]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.usage for answer in together] == [answer.usage for answer in alone]


def test_one_that_cannot_be_answered_leaves_the_others_alone(model: Assistant, picture: PIL.Image.Image) -> None:
    good = conversation(picture, "how many?")
    long = conversation(picture, "circles " * 500)
    found = model.answer([good, long, good], Sampling(max_new_tokens=4))
    assert isinstance(found[1].error, CapacityError)
    assert found[0].error is None
    assert found[0].text == found[2].text == model.chat(good, max_new_tokens=4).text
    with pytest.raises(CapacityError, match="for a context of 256"):
        model.chat(long)


@pytest.mark.parametrize("question", ["", " \n\t "])
def test_an_empty_question_is_told(model: Assistant, picture: PIL.Image.Image, question: str) -> None:
    with pytest.raises(InputError, match="the question is empty, expected some words"):
        model.ask(picture, question)


def test_what_is_no_question_and_no_setting_is_told(model: Assistant, picture: PIL.Image.Image) -> None:
    with pytest.raises(InputError, match="the question is of the type NoneType, expected words"):
        model.ask(picture, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the phrase is of the type NoneType, expected words"):
        model.detect(picture, None)  # type: ignore[arg-type]
    for ask in (model.ask, lambda *words, **settings: list(model.stream(*words, **settings))):
        with pytest.raises(InputError, match="unknown setting 'max_tokens'; did you mean 'max_new_tokens'"):
            ask(picture, "how many?", max_tokens=3)
        with pytest.raises(InputError, match="temperature is 'x', expected 0"):
            ask(picture, "how many?", temperature="x")


def test_a_question_without_a_picture_is_answered(model: Assistant) -> None:
    answer = model.ask(None, "how many?", max_new_tokens=2)
    assert answer.error is None and answer.usage["image_tokens"] == 0


def test_the_low_level_door_continues_as_the_assistant_does(model: Assistant, picture: PIL.Image.Image) -> None:
    example = model.engine.processor(conversation(picture, "how many?"))
    inputs = {"input_ids": example.ids[None], "pixel_values": torch.stack(example.pixels)}
    logits = model.logits(**inputs)
    assert logits.dtype == torch.float32
    ids = model.generate_ids(**inputs, max_new_tokens=6)[0].tolist()
    assert ids[0] == int(logits[0, -1].argmax())
    text = model.engine.processor.read(ids, example.transforms).text
    assert text == model.ask(picture, "how many?", max_new_tokens=6).text


def test_the_default_model_is_asked_for_without_a_name(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    monkeypatch.setattr("sightline.zoo.catalogue.ASSETS", tiny_folder.parent)
    monkeypatch.setattr("sightline.zoo.names.DEFAULT", "tiny")
    assert sightline.load().name == "tiny"
    assert sightline.load("tiny").name == "tiny"


def test_an_image_value_is_not_opened_again(picture: PIL.Image.Image) -> None:
    image = open_image(picture)
    assert conversation(image, "x")[0].parts[0] is image


def test_the_model_of_a_run_is_called_as_the_run_is(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "mine" / "model")
    assert sightline.load(tmp_path / "mine" / "model").name == "mine"
