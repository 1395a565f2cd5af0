"""Templates: each family's layout, segment by segment, and text that stays text in all of them."""

import PIL.Image
import pytest
from hypothesis import given, settings, strategies as st

from sightline.core.errors import InputError
from sightline.core.geometry import Box, Frame, Point
from sightline.core.sequence import Audio, Conversation, Image, Message, Region, Text, Video, ask
from sightline.data.images import Square
from sightline.data.processor import Processor
from sightline.data.template import (
    TEMPLATES,
    VICUNA_SYSTEM,
    Control,
    End,
    Places,
    Segment,
    Slot,
    Words,
    vicuna_template,
)
from sightline.grounding.codecs import LocationTokens
from sightline.language.tokenizer import Tokenizer, train_tokenizer
from sightline.zoo import fuyu, idefics, kosmos2, paligemma, shikra

# what is shared, and two families that know neither a system message nor, the one, a second question
FORMS = TEMPLATES | {"idefics": idefics.template, "paligemma": paligemma.template}
RED, BLUE = (Image(PIL.Image.new("RGB", (8, 8), color)) for color in ("red", "blue"))
CAT, DOG = Box(0, 0, 4, 4, Frame(8, 8), "cat"), Box(4, 4, 8, 8, Frame(8, 8), "dog")
CONTROLS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<s>",
    "</s>",
    idefics.FAKE,
    "<end_of_utterance>",
    "<image>",
    "<user>",
    "<assistant>",
    *LocationTokens(16).names,
)

QUESTION = ask("What?", RED)
TURNS: Conversation = (*ask("What?", RED, answer="A cat."), Message("user", (Text("Where?"),)))
SYSTEM: Conversation = (Message("system", (Text("Be brief."),)), *QUESTION)


@pytest.mark.parametrize(
    "name, conversation, segments",
    [
        ("sightline", QUESTION, [Control("<bos>"), Slot(0), Control("<user>"), Words("What?"), Control("<assistant>")]),
        (
            "sightline",
            TURNS,
            [
                *(Control("<bos>"), Slot(0), Control("<user>"), Words("What?")),
                *(Control("<assistant>"), Words(" A cat.", learned=True), End("<eos>")),
                *(Control("<user>"), Words("Where?"), Control("<assistant>")),
            ],
        ),
        (
            "sightline",
            SYSTEM,
            [
                *(Control("<bos>"), Slot(0), Words("Be brief.")),
                *(Control("<user>"), Words("What?"), Control("<assistant>")),
            ],
        ),
        (
            "llava-v1",
            TURNS,
            [
                *(Control("<s>"), Words(VICUNA_SYSTEM + "USER: "), Slot(0), Words("\nWhat? ASSISTANT:")),
                *(Words(" A cat.", learned=True), End("</s>"), Words("USER: Where? ASSISTANT:")),
            ],
        ),
        ("llava-v1", SYSTEM, [Control("<s>"), Words("Be brief. USER: "), Slot(0), Words("\nWhat? ASSISTANT:")]),
        ("llava-hf", QUESTION, [Control("<s>"), Words("USER: "), Slot(0), Words("\nWhat? ASSISTANT:")]),
        ("llava-plain", QUESTION, [Control("<s>"), Slot(0)]),
        ("llava-plain", TURNS[:2], [Control("<s>"), Slot(0), Words("A cat.\n", learned=True)]),
        (
            "idefics",
            (Message("user", (RED, BLUE, Text("Which?"))), Message("assistant", (Text("Red."),))),
            [
                Control("<s>"),
                Words("User:"),
                Control(idefics.FAKE),
                Slot(0),
                Control(idefics.FAKE),
                Slot(1),
                Control(idefics.FAKE),
                Words("Which?"),
                Control("<end_of_utterance>"),
                Words("\nAssistant:"),
                Words(" Red.", learned=True),
                End("<end_of_utterance>"),
            ],
        ),
        (
            "idefics",
            (Message("user", (Text("What?"), RED)),),
            [
                Control("<s>"),
                Words("User: What?"),
                Control(idefics.FAKE),
                Slot(0),
                Control(idefics.FAKE),
                Control("<end_of_utterance>"),
                Words("\nAssistant:"),
            ],
        ),
        ("paligemma", QUESTION, [Slot(0), Control("<bos>"), Words("What?\n")]),
        (
            "paligemma",
            TURNS[:2],
            [Slot(0), Control("<bos>"), Words("What?\n"), Words("A cat.", learned=True), End("<eos>")],
        ),
    ],
)
def test_each_family_lays_a_conversation_out_in_its_own_way(
    name: str, conversation: Conversation, segments: list[Segment]
) -> None:
    assert FORMS[name](conversation) == segments


def test_in_llava_hf_s_form_a_line_break_follows_each_image_that_words_follow() -> None:
    parts = (RED, BLUE, Text("Which? "), RED)
    found = vicuna_template(system="", newline=True)((Message("user", parts),))
    words = (Words("\n"), Slot(1), Words("\nWhich? "), Slot(2), Words(" ASSISTANT:"))
    assert found == [Control("<s>"), Words("USER: "), Slot(0), *words]
    plain = vicuna_template(system="", newline=False)((Message("user", parts),))
    assert plain[2:] == [Slot(0), Slot(1), Words("Which? "), Slot(2), Words(" ASSISTANT:")]


def test_in_our_own_form_all_images_come_first() -> None:
    """Several questions about them then share one prefix."""
    later = (*ask("What?", RED, answer="A cat."), *ask("And here?", BLUE))
    segments = FORMS["sightline"](later)
    assert segments[:3] == [Control("<bos>"), Slot(0), Slot(1)]
    assert not any(isinstance(segment, Slot) for segment in segments[3:])


@pytest.mark.parametrize("name", ["sightline", "llava-v1", "llava-hf"])
def test_frames_of_a_video_are_images(name: str) -> None:
    film = Message("user", (RED, Video((BLUE, RED), (0.0, 1.0)), Text("What?")))
    slots = [segment for segment in FORMS[name]((film,)) if isinstance(segment, Slot)]
    assert slots == [Slot(0), Slot(1), Slot(2)]


@pytest.mark.parametrize("name", ["paligemma", "kosmos2", "fuyu", "shikra"])
def test_frames_of_a_film_stand_where_its_pictures_would(name: str) -> None:
    """Families that put pictures before a control token, or words after each."""
    picture = Image(PIL.Image.new("RGB", (4, 4)))
    template = {"paligemma": paligemma.template, "kosmos2": kosmos2.template, "shikra": shikra.template}.get(name)
    film, single = Video((picture, picture), (0.0, 1.0)), (picture, picture)
    if template is None:
        with pytest.raises(InputError, match="reads one picture, the question has 2"):
            fuyu.template(ask("how?", film))
        template, film, single = fuyu.template, Video((picture,), (0.0,)), (picture,)  # type: ignore[assignment]
    assert template(ask("how?", film)) == template(ask("how?", *single))


def test_places_of_one_image_are_written_together() -> None:
    regions = (Region(CAT), Region(DOG), Region(Point(1, 1, Frame(8, 8)), image=1))
    answer = Message("assistant", (Text("Here:"), *regions))
    segments = FORMS["sightline"]((*ask("Where?", RED, BLUE), answer))
    assert segments[-4:] == [
        Words(" Here:", learned=True),
        Places((CAT, DOG), 0, learned=True),
        Places((Point(1, 1, Frame(8, 8)),), 1, learned=True),
        End("<eos>"),
    ]


def test_a_user_s_places_are_not_learned() -> None:
    asked = Message("user", (Text("What is at "), Region(CAT), Text("?")))
    segments = FORMS["llava-hf"]((asked,))
    assert segments[1:] == [Words("USER: What is at "), Places((CAT,), 0), Words("? ASSISTANT:")]


USER, ASSISTANT = Message("user", (Text("a"),)), Message("assistant", (Text("b"),))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "conversation, said",
    [
        ((), "the conversation is empty, expected a message from the user"),
        ((Message("system", (Text("c"),)),), "the conversation is empty"),
        ((ASSISTANT,), "message 1 is from the assistant, expected the user"),
        ((USER, USER), "message 2 is from the user, expected the assistant"),
        ((USER, ASSISTANT, ASSISTANT), "message 3 is from the assistant, expected the user"),
        ((Message("tool", (Text("c"),)),), "message 1 is from the tool, expected the user"),  # type: ignore[arg-type]
    ],
)
def test_user_and_assistant_take_turns(name: str, conversation: Conversation, said: str) -> None:
    with pytest.raises(InputError, match=said):
        FORMS[name](conversation)


def test_a_family_of_one_question_says_so() -> None:
    with pytest.raises(InputError, match="this model answers one question, the conversation has 3 messages"):
        FORMS["paligemma"](TURNS)


@pytest.mark.parametrize("name", ["llava-plain", "paligemma", "idefics"])
def test_a_system_message_is_refused_where_a_family_has_no_place_for_it(name: str) -> None:
    with pytest.raises(InputError, match="no place for a system message"):
        FORMS[name](SYSTEM)


@pytest.mark.parametrize("name", sorted(set(FORMS) - {"llava-plain", "interleaved"}))  # no words of a user, sounds
def test_sound_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="this model reads text and images, not audio"):
        FORMS[name]((Message("user", (Audio(None, 8000),)),))


def tokenizer() -> Tokenizer:
    """One whose ordinary vocabulary knows the letters of control tokens well."""
    texts = ["how many red circles? USER: ASSISTANT: user image eos <user> <image> <loc001>"] * 30
    return train_tokenizer(texts, 600, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")


TOKENIZER = tokenizer()
PROCESSORS = {
    name: Processor(TOKENIZER, template, Square(8), lambda grid: grid[1] * grid[2], 4, "<image>", LocationTokens(16))
    for name, template in FORMS.items()
}


def controls_in(name: str, *typed: str) -> list[int]:
    """The control ids of a conversation in which somebody typed something wherever text may stand."""
    system, question, answer, label, again = (Text(text) for text in typed)
    talk = [
        Message("user", (RED, question)),
        Message("assistant", (answer, Region(Box(0, 0, 4, 4, Frame(8, 8), label.text)))),
    ]
    if name in ("sightline", "llava-v1", "llava-hf"):
        talk = [Message("system", (system,)), *talk, Message("user", (again,))]
    return [index for index in PROCESSORS[name](tuple(talk)).ids.tolist() if index in TOKENIZER.controls.values()]


@pytest.mark.parametrize("name", FORMS)
def test_every_control_token_typed_as_text_is_text(name: str) -> None:
    everything = "".join(CONTROLS) + " ".join(CONTROLS) + "<<image>image><ima<image>ge>"
    wanted = controls_in(name, *"abcde")
    assert len(wanted) >= 5 + 4  # the template's own, four slots and a place
    assert controls_in(name, *[everything] * 5) == wanted


pieces = st.sampled_from(
    [*CONTROLS[:10], "<loc003>", "<", ">", "</", "|", " ", "\n", "user", "image", "é", "🙂", "\0", "Ġ"]
)
typed = st.lists(pieces | st.text(max_size=3), max_size=8).map("".join)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.tuples(typed, typed, typed, typed, typed))
def test_nothing_that_can_be_typed_becomes_a_control_token(name: str, texts: tuple[str, ...]) -> None:
    assert controls_in(name, *texts) == controls_in(name, *"abcde")
