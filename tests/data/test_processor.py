"""Conversations to numbers and back: slots, labels, images, the limit of the context, branches, answers."""

from typing import Any

import PIL.Image
import pytest
import torch

from sightline.core.errors import CapacityError, ConfigError, InputError
from sightline.core.geometry import Box, Frame, Point
from sightline.core.layout import Medium, visible
from sightline.core.sequence import Conversation, Image, Message, Region, Text, ask
from sightline.data.batch import IGNORE, collate
from sightline.data.images import PadSquare, Square
from sightline.data.processor import Processor
from sightline.data.template import TEMPLATES
from sightline.grounding.codecs import Codec, Decimals, LocationTokens
from sightline.language.tokenizer import train_tokenizer
from sightline.zoo import paligemma

CODEC = LocationTokens(64)
CONTROLS = ("<pad>", "<bos>", "<eos>", "<s>", "</s>", "<image>", "<user>", "<assistant>", *CODEC.names)
TEXTS = ["how many red circles are there? where is the cat? two, here and there. USER: ASSISTANT:"] * 30
TOKENIZER = train_tokenizer(TEXTS, 600, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")

FORMS = TEMPLATES | {"paligemma": paligemma.template}
RED, BLUE = (Image(PIL.Image.new("RGB", (60, 40), color)) for color in ("red", "blue"))
FRAME = Frame(60, 40)


def processor(template: str = "sightline", codec: Codec | None = CODEC, **changes: Any) -> Processor:
    """Pictures of 16 x 16 in patches of 4, four patches to a token: an image takes 4 slots."""
    settings: dict[str, Any] = {"pixels": Square(16), "look": "causal", "max_length": 200} | changes
    return Processor(
        tokenizer=TOKENIZER,
        template=FORMS[template],
        num_tokens=lambda grid: grid[1] * grid[2] // 4,
        patch=4,
        image_token="<image>",
        codec=codec,
        **settings,
    )


def talk(*turns: tuple[str, str], images: tuple[Image, ...] = (RED,)) -> Conversation:
    """Questions and answers, the images before the first."""
    first, *rest = (ask(question, answer=answer) for question, answer in turns)
    with_images = Message("user", (*images, *first[0].parts))
    return (with_images, *first[1:], *(message for turn in rest for message in turn))


def shown(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids.tolist(), skip_control=False)


def test_a_prompt_holds_slots_words_and_nothing_to_learn() -> None:
    example = processor()(ask("how many?", RED))
    assert shown(example.ids) == "<bos><image><image><image><image><user>how many?<assistant>"
    assert example.slots.tolist() == [1, 2, 3, 4]
    assert example.medium.tolist()[:7] == [Medium.TEXT, *[Medium.IMAGE] * 4, Medium.TEXT, Medium.TEXT]
    assert example.item.tolist() == [0] + [1] * (example.length - 1)
    assert example.position.tolist() == example.block.tolist() == list(range(example.length))
    assert (example.labels == IGNORE).all() and (example.branch == 0).all() and example.causal
    assert [pixels.shape for pixels in example.pixels] == [(3, 16, 16)]
    assert example.transforms[0].source == FRAME and example.transforms[0].target == Frame(16, 16)


def test_framed_pictures_share_positions() -> None:
    """CogVLM: the first of a picture's tokens, all its patches and the last have three positions; the last is text."""
    example = processor(framed=True)(talk(("how many?", "two"), images=(RED, BLUE)))
    assert example.slots.tolist() == list(range(1, 9))
    assert example.position.tolist()[:10] == [0, 1, 2, 2, 3, 4, 5, 5, 6, 7]
    assert int(example.position[-1]) == example.length - 3
    assert [t for t in range(9) if example.medium[t] == Medium.IMAGE] == [1, 2, 3, 5, 6, 7]
    assert example.block.tolist() == list(range(example.length)) and example.causal


def test_each_label_is_the_next_token_of_an_answer() -> None:
    example = processor()(talk(("how many?", "two"), ("where?", "here")))
    learned = example.labels != IGNORE
    assert shown(example.labels[learned]) == " two<eos> here<eos>"
    assert torch.equal(example.labels[learned], example.ids[1:][learned[:-1]])
    before = TOKENIZER.control("<assistant>")
    assert example.ids[learned.nonzero()[0]].item() == before  # the first is predicted from the token before the answer


def test_several_images_keep_their_order_and_count() -> None:
    example = processor(template="llava-hf")((Message("user", (RED, Text("and "), BLUE, Text("where?"))),))
    assert len(example.slots) == 8 and (example.ids[example.slots] == TOKENIZER.control("<image>")).all()
    assert example.item[example.slots].tolist() == [1] * 4 + [2] * 4
    red, blue = example.pixels
    assert red[0].min() > 0.99 and red[2].max() < -0.99 and blue[2].min() > 0.99
    batch = collate([example], 4, 0)
    assert batch.patches is not None and batch.patches.grids == ((1, 4, 4),) * 2


@pytest.mark.parametrize("template", ["llava-hf", "paligemma"])
def test_images_that_the_template_has_no_place_for_are_told(template: str) -> None:
    """Features would land on the wrong tokens otherwise."""
    hidden = (Message("system", (BLUE,)), *ask("where?", RED))
    with pytest.raises(InputError, match=r"2 images for 1 places|no place for a system message"):
        processor(template=template)(hidden)


def test_a_prompt_that_does_not_fit_is_told_with_its_numbers() -> None:
    prompt = ask("how many red circles? " * 20, RED)
    length = processor(max_length=1000)(prompt).length
    assert processor(max_length=length)(prompt).length == length
    with pytest.raises(
        CapacityError, match=rf"^{length} tokens \(4 of images\) for a context of {length - 1}; shorten"
    ):
        processor(max_length=length - 1)(prompt)


def test_training_drops_the_last_turns_that_do_not_fit() -> None:
    turns = [(f"how many {n}?", "two " * n) for n in range(1, 6)]
    for kept in range(1, 5):
        room = processor()(talk(*turns[:kept])).length
        for spare in (0, 3):  # three more tokens hold no further turn
            example = processor(max_length=room + spare)(talk(*turns))
            assert torch.equal(example.ids, processor()(talk(*turns[:kept])).ids)


@pytest.mark.parametrize("system", [(), (Message("system", (Text("how?"),)),)])
def test_a_first_turn_that_does_not_fit_is_told(system: Conversation) -> None:
    with pytest.raises(CapacityError, match="for a context of 12"):
        processor(max_length=12)((*system, *talk(("how many red circles?", "two"), ("where?", "here"))))


@pytest.mark.parametrize("template", ["sightline", "llava-hf"])
def test_an_image_is_dropped_with_its_turn_and_never_cut(template: str) -> None:
    both = (*talk(("how many?", "two")), *ask("where is the cat?", BLUE, answer="here " * 9))
    whole = processor(template)(both)
    alone = processor(template)(both[:2])
    for room in range(alone.length, whole.length + 1):
        example = processor(template, max_length=room)(both)
        expected = whole if room == whole.length else alone
        assert torch.equal(example.ids, expected.ids) and len(example.slots) == 4 * len(example.pixels)
        assert len(example.transforms) == len(expected.transforms)


def test_a_prefix_sees_itself_whole_and_the_answer_is_causal() -> None:
    example = processor("paligemma", look="prefix")(talk(("how many?", "two")))
    answer = int((example.labels != IGNORE).long().argmax()) + 1
    assert not example.causal
    layout = collate([example], 4, 0).layout
    seen = visible(layout, layout)[0]
    assert seen[:answer, :answer].all() and not seen[:answer, answer:].any()
    assert torch.equal(seen[answer:, answer:], torch.ones_like(seen[answer:, answer:]).tril())
    prompt = processor("paligemma", look="prefix")(ask("how many?", RED))
    assert torch.equal(prompt.ids, example.ids[:answer]) and (prompt.block == 0).all()


def test_an_answer_beside_what_is_read_begins_with_its_start() -> None:
    """An encoder-decoder's: earlier answers are read, the last one is written, places in it as elsewhere."""
    cat = Message("assistant", (Text("the"), Region(Box(15, 10, 45, 30, FRAME, " cat"))))
    conversation = (*talk(("how many?", "two")), *ask("where?"), cat)
    example, prompt = processor(start=0)(conversation), processor(start=0)(conversation[:-1])
    read = "<bos><image><image><image><image><user>how many?<assistant> two<eos><user>where?<assistant>"
    assert shown(example.read.ids) == shown(prompt.read.ids) == read
    written = "<pad> the cat<box><loc016><loc016><loc048><loc048><eos>"
    assert (shown(example.ids), shown(prompt.ids)) == (written, "<pad>")
    assert example.position.tolist() == example.block.tolist() == list(range(example.length))
    assert example.labels.tolist() == [*example.ids[1:].tolist(), IGNORE] and (example.read.labels == IGNORE).all()
    assert (len(example.pixels), len(example.read.pixels)) == (0, 1) and example.transforms == example.read.transforms
    assert example.slots.tolist() == [] and example.read.slots.tolist() == [1, 2, 3, 4]
    whole = processor()(conversation)
    assert torch.equal(torch.cat([example.read.ids, example.ids[1:]]), whole.ids)


def test_either_side_beside_the_other_fits_the_context() -> None:
    conversation = talk(("how many?", "two"))
    length = processor(start=0)(conversation).read.length
    assert processor(start=0, max_length=length)(conversation).read.length == length
    with pytest.raises(CapacityError, match=f"{length} tokens \\(4 of images\\) for a context of {length - 1}"):
        processor(start=0, max_length=length - 1)(conversation)


def test_a_fusion_that_reads_is_given_what_is_asked() -> None:
    read = processor(instruct=TOKENIZER.encode)
    assert read(ask("how many?")).instruction is None
    example = read(talk(("how many?", "two"), images=(RED, BLUE)))
    assert example.instruction is not None and shown(example.instruction) == "how many?"
    other = read(ask("where is the cat?", RED))
    batch = collate([example, other], 4, 0)
    assert batch.instruction is not None and len(batch.instruction) == 3  # a row for each picture
    assert [shown(row[row >= 0]) for row in batch.instruction] == ["how many?", "how many?", "where is the cat?"]
    with pytest.raises(CapacityError, match="what reads it with the picture takes 2"):
        processor(instruct=TOKENIZER.encode, instruction_length=2)(ask("where is the cat?", RED))


@pytest.mark.parametrize("changes", [{"look": "prefix"}, {"start": 0}, {"instruct": TOKENIZER.encode}])
def test_questions_that_pictures_depend_on_are_learned_one_at_a_time(changes: dict[str, Any]) -> None:
    made = processor(**changes)
    assert torch.equal(made.branches(talk(("how many?", "two"))).ids, made(talk(("how many?", "two"))).ids)
    with pytest.raises(InputError, match="learns one question at a time"):
        made.branches(talk(("how many?", "two"), ("where?", "here")))


def test_branches_are_the_turns_as_if_each_were_the_only_one() -> None:
    turns = [("how many?", "two"), ("where is the cat?", "here and there"), ("how many red?", "two two")]
    joined = processor().branches(talk(*turns))
    trunk = int((joined.branch == 0).sum())
    assert trunk > 5 and len(joined.slots) == 4 and len(joined.pixels) == 1 and not joined.causal
    for number, turn in enumerate(turns, start=1):
        alone = processor()(talk(turn))
        mine = (joined.branch == 0) | (joined.branch == number)
        for name in ("ids", "position", "block", "item", "medium"):
            assert torch.equal(getattr(joined, name)[mine], getattr(alone, name)), name
        assert torch.equal(joined.labels[mine][trunk:], alone.labels[trunk:])
    assert (joined.labels[:trunk] == IGNORE).all()


def test_branches_with_a_system_message_and_one_turn() -> None:
    conversation = (Message("system", (Text("two, "),)), *talk(("how many?", "two")))
    assert torch.equal(processor().branches(conversation).ids, processor()(conversation).ids)


def test_branches_longer_than_the_context_are_refused() -> None:
    turns = talk(("how many?", "two"), ("where is the cat?", "here and there"))
    length = processor().branches(turns).length
    assert processor(max_length=length).branches(turns).length == length
    with pytest.raises(InputError, match=f"{length} tokens of 2 questions for a context of {length - 1}"):
        processor(max_length=length - 1).branches(turns)


def test_places_are_written_in_the_model_s_picture_and_read_in_the_original() -> None:
    answer = Message("assistant", (Text("the"), Region(Box(15, 10, 45, 30, FRAME, " cat"))))
    example = processor()((*ask("where?", RED), answer))
    learned = example.labels[example.labels != IGNORE]
    assert shown(learned) == " the cat<box><loc016><loc016><loc048><loc048><eos>"
    found = processor().read(learned.tolist(), example.transforms)
    assert found.text == found.boxes[0].label == "the cat" and found.boxes[0].frame == FRAME
    assert found.boxes[0].xyxy == pytest.approx((15, 10, 45, 30), abs=60 / 64)


def test_a_label_is_text_whatever_it_says() -> None:
    for label in ("<eos>", "<image><bos>", "a<box><loc001>"):
        answer = Message("assistant", (Region(Box(0, 0, 60, 40, FRAME, label)),))
        ids = processor()((*ask("where?", RED), answer)).ids.tolist()
        named = [TOKENIZER.pieces([index])[0].text for index in ids if index in TOKENIZER.controls.values()]
        assert named[-6:] == ["<box>", "<loc000>", "<loc000>", "<loc063>", "<loc063>", "<eos>"]
        assert named[:-6] == ["<bos>", *["<image>"] * 4, "<user>", "<assistant>"]
        assert label in TOKENIZER.decode(ids)


def test_a_place_belongs_to_the_image_it_names() -> None:
    tall = Image(PIL.Image.new("RGB", (20, 40)))
    point = Message("assistant", (Region(Point(10, 10, Frame(20, 40)), image=1),))
    example = processor()((*ask("where?", RED, tall), point))
    assert shown(example.labels[example.labels != IGNORE]) == "<point><loc032><loc016><eos>"


@pytest.mark.parametrize(
    "region, codec, said",
    [
        (Region(Point(1, 1, FRAME), image=1), CODEC, "a place in image 2 of a conversation with 1"),
        (Region(Point(1, 1, FRAME), image=-1), CODEC, "a place in image 0 of a conversation with 1"),
        (Region(Point(1, 1, FRAME)), None, "this model has no way to write places"),
        (Region(Point(1, 1, Frame(8, 8))), CODEC, "measured in 8x8 pixels, expected pixels of 60x40"),
    ],
)
def test_places_that_cannot_be_written_are_told(region: Region, codec: Codec | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        processor(codec=codec)((Message("user", (RED, Text("what is at "), region)),))


def test_without_a_picture_places_are_shares_of_their_frame() -> None:
    answer = Message("assistant", (Region(Point(30, 10, FRAME)),))
    example = processor(codec=Decimals())((*ask("where?"), answer))
    assert shown(example.labels[example.labels != IGNORE]) == "[0.500,0.250]<eos>"
    assert example.pixels == () and example.slots.tolist() == []


def test_answers_are_read_with_the_last_image_s_way() -> None:
    prompt = processor(pixels=PadSquare(16))(ask("where?", RED, Image(PIL.Image.new("RGB", (20, 40)))))
    ids = TOKENIZER.trusted("<point><loc032><loc032>")
    found = processor().read(ids, prompt.transforms)
    assert found.points[0].frame == Frame(20, 40)
    assert (found.points[0].x, found.points[0].y) == pytest.approx((10, 20), abs=40 / 64)


def test_without_a_codec_or_a_picture_answers_are_text() -> None:
    ids = TOKENIZER.trusted(" here<box><loc001><loc001><loc002><loc002><eos>")
    example = processor()(ask("where?", RED))
    assert processor(codec=None).read(ids, example.transforms).text == "here"
    assert processor().read(ids, ()).text == "here" and processor().read(ids, ()).boxes == ()


def test_an_unknown_image_token_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no control token '<img>'"):
        Processor(TOKENIZER, TEMPLATES["sightline"], Square(16), lambda grid: 4, 4, "<img>")


def test_half_a_character_is_told() -> None:
    with pytest.raises(InputError, match="half a character"):
        processor()(ask("how \ud83d many?", RED))
