"""Conversations are values: equal by content, usable as keys, their images in order."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from sightline.core.geometry import Box, Frame, Point
from sightline.core.sequence import Audio, Conversation, Image, Message, Region, Text, Video, ask, images_of


def image(color: str, size: tuple[int, int] = (4, 3), source: str = "") -> Image:
    return Image(PIL.Image.new("RGB", size, color), source)


def conversation(color: str = "red", x: float = 1) -> Conversation:
    """Every kind of part, made anew at each call."""
    film = Video((image(color), image("blue")), (0.0, 0.5))
    sound = Audio(np.arange(4, dtype=np.float32), 16_000)
    place = Region(Box(x, 1, 2, 2, Frame(4, 3), "dot"))
    return (Message("user", (image(color), film, sound, Text("Where?"))), Message("assistant", (Text("Here"), place)))


def test_equal_content_is_equal_and_one_key() -> None:
    assert conversation() == conversation() and hash(conversation()) == hash(conversation())
    assert {conversation(): 1}[conversation()] == 1


@pytest.mark.parametrize("other", [conversation("green"), conversation(x=0), conversation()[:1], conversation()[::-1]])
def test_other_content_is_not_equal(other: Conversation) -> None:
    assert other != conversation()
    assert len({other, conversation()}) == 2


def test_images_are_equal_by_pixels_and_size_not_by_name() -> None:
    assert image("red", source="a.png") == image("red", source="b.png")
    assert image("red") != image("blue")
    assert image("red", (4, 3)) != image("red", (3, 4))  # the same bytes, another shape
    assert image("red") != "red"


def test_sounds_are_equal_by_samples_and_rate() -> None:
    samples = np.linspace(-1, 1, 8, dtype=np.float32)
    assert Audio(samples, 8000) == Audio(samples.copy(), 8000) and hash(Audio(samples, 8000)) == hash(
        Audio(samples, 8000)
    )
    assert Audio(samples, 8000) != Audio(samples, 16_000)
    assert Audio(samples, 8000) != Audio(-samples, 8000)
    assert Audio(samples, 8000) != samples.tobytes()


def test_values_are_frozen() -> None:
    for value, name in ((Text("a"), "text"), (image("red"), "source"), (Message("user"), "role")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, "b")


def test_regions_are_of_an_image_and_a_place() -> None:
    frame = Frame(4, 3)
    assert Region(Point(1, 1, frame)) == Region(Point(1, 1, frame), image=0)
    assert Region(Point(1, 1, frame)) != Region(Point(1, 1, frame), image=1)
    assert Region(Point(1, 1, frame)) != Region(Box(1, 1, 1, 1, frame))


def test_the_text_of_a_message_is_that_of_its_text_parts() -> None:
    assert Message("user", (Text("one "), image("red"), Text("two"))).text == "one two"
    assert Message("assistant").text == ""


def test_images_of_a_conversation_come_in_order_frames_one_by_one() -> None:
    red, green, blue, grey = (image(name) for name in ("red", "green", "blue", "grey"))
    talk = (
        Message("system", (red,)),
        Message("user", (Text("a"), green, Video((blue, red), (0.0, 1.0)))),
        Message("assistant", (Text("b"),)),
        Message("user", (grey, red)),
    )
    assert images_of(talk) == (red, green, blue, red, grey, red)
    assert images_of(()) == ()


def test_ask_writes_images_question_and_answer() -> None:
    red, blue = image("red"), image("blue")
    assert ask("Which?", red, blue) == (Message("user", (red, blue, Text("Which?"))),)
    assert ask("Which?", answer="") == (Message("user", (Text("Which?"),)), Message("assistant", (Text(""),)))
