"""Shikra's and Ferret's folders: how a conversation about regions becomes numbers, and that they answer it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import sightline
from sightline.core.errors import ConfigError, InputError
from sightline.core.geometry import Box, Frame, Mask, Point
from sightline.core.sequence import Conversation, Image, Message, Part, Region, Text
from sightline.data.batch import Example, collate, pack
from sightline.grounding.sampler import RegionSampler
from sightline.language.tokenizer import train_tokenizer
from sightline.serving.assistant import Assistant
from sightline.serving.engine import Engine
from sightline.serving.sampling import Sampling
from sightline.zoo import ferret
from sightline.zoo.checkpoint import write
from sightline.zoo.families import FAMILIES, ROWS
from sightline.zoo.prepared import prepared

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 7, "model_type": "clip_vision_model"}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 503}
TEXT |= {"mm_vision_tower": "tower", "mm_vision_select_layer": -2, "rms_norm_eps": 1e-6}
CONTROLS = {
    "shikra": ("<unk>", "<s>", "</s>", "<im_patch>", "<im_start>", "<im_end>"),
    "ferret": ("<unk>", "<s>", "</s>", "<region_fea>"),
}
PICTURE = Image(PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8)))
FRAME = Frame(60, 30)


@pytest.fixture(scope="module", params=["shikra", "ferret"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def assistants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Assistant]:
    """Random folders of both in their published layout, the tower in the file."""
    out = {}
    for name, controls in CONTROLS.items():
        folder = tmp_path_factory.mktemp("regions") / name
        c = {"model_type": name, **TEXT, "region_geo_sampler": True, "im_region_fea_token": 3}
        write(folder / "tower", {"unused": torch.zeros(1)}, VISION)
        chosen, generator = FAMILIES[name], torch.Generator().manual_seed(4)
        model = chosen.build(c, folder)
        tensors = {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in model.state_dict().items()}
        write(folder, chosen.keys(model.config).save(tensors), c)  # type: ignore[arg-type]
        texts = ["USER: what is in [0.123,0.456] this region? ASSISTANT: a cat"] * 30
        train_tokenizer(texts, 500, controls).save(folder)
        out[name] = sightline.load(folder)
    return out


def asked(*parts: Part, answer: str | None = None) -> Conversation:
    said = (Message("user", parts),)
    return said if answer is None else (*said, Message("assistant", (Text(answer),)))


def shown(assistant: Assistant, example: Example) -> str:
    text = assistant.engine.processor.tokenizer.decode(example.ids.tolist(), skip_control=False)
    for name in ("<im_patch>", "<unk>"):
        text = text.replace(name * 16, "#")
    return text


def test_shikra_writes_decimals_of_the_white_square(assistants: dict[str, Assistant]) -> None:
    model = assistants["shikra"]
    box = Box(15, 0, 45, 30, FRAME)
    example = model.engine.processor(asked(PICTURE, Text("what is "), Region(box), Text("?")))
    wanted = "questions. USER: <im_start>#<im_end> what is [0.250,0.250,0.750,0.750]? ASSISTANT:"
    assert shown(model, example).endswith(wanted)
    assert shown(model, example).startswith("<s>A chat between a curious user")
    top = example.pixels[0][:, 0]  # of the bar above the picture
    white = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(top, white[:, None].expand(3, 28), atol=1e-5, rtol=0)
    read = model.engine.processor.tokenizer.encode("a cat [0.250,0.250,0.750,0.750]")
    assert model.engine.processor.read(read, example.transforms).boxes[0].xyxy == box.xyxy


def test_ferret_writes_a_region_and_the_place_of_its_token(assistants: dict[str, Assistant]) -> None:
    model = assistants["ferret"]
    pixels = np.zeros((30, 60), dtype=bool)
    pixels[3:9, 6:12] = True
    shapes = (Box(15, 0, 45, 30, FRAME), Mask(pixels, FRAME))
    example = model.engine.processor(
        asked(PICTURE, Text("what is "), *map(Region, shapes), Text(" near "), Region(Point(30, 15, FRAME)), Text("?"))
    )
    places = "[250, 0, 750, 1000] <region_fea>, [100, 100, 200, 300] <region_fea> near [500, 500] <region_fea>?"
    text = shown(model, example)
    assert text.endswith(f"Follow instructions.  USER: #\nwhat is {places} ASSISTANT:")
    assert example.regions is not None
    assert example.ids[example.regions.slots].tolist() == [3, 3, 3]
    assert example.regions.items.tolist() == [0, 0, 0] and example.regions.points.shape == (3, 512, 2)
    low, high = example.regions.points.amin(1), example.regions.points.amax(1)
    torch.testing.assert_close(low, torch.tensor([[15 / 60, 0], [6 / 60, 3 / 30], [25 / 60, 10 / 30]]))
    torch.testing.assert_close(high, torch.tensor([[45 / 60, 29 / 30], [11 / 60, 8 / 30], [35 / 60, 20 / 30]]))


def test_a_region_in_an_answer_is_words(assistants: dict[str, Assistant]) -> None:
    talk = (*asked(PICTURE, Text("where?")), Message("assistant", (Region(Box(15, 0, 45, 30, FRAME, "a cat")),)))
    example = assistants["ferret"].engine.processor(talk)
    assert example.regions is None
    assert shown(assistants["ferret"], example).endswith("ASSISTANT:a cat [250, 0, 750, 1000]</s>")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("shikra", "USER: In the given <im_start>#<im_end> , could you find and tell me the coordinates of a cat?"),
        ("ferret", "USER: #\nWhat is the location of a cat in the image?"),
    ],
)
def test_how_they_are_asked_for_a_place(assistants: dict[str, Assistant], name: str, wanted: str) -> None:
    model = assistants[name]
    codec = model.engine.processor.codec
    assert codec is not None
    example = model.engine.processor(asked(*codec.find("a cat", PICTURE)))
    assert shown(model, example).endswith(f"{wanted} ASSISTANT:")
    model.detect(PICTURE, "a cat", max_new_tokens=2)


def test_nobody_can_type_a_region(assistants: dict[str, Assistant]) -> None:
    example = assistants["ferret"].engine.processor(asked(PICTURE, Text("what is <region_fea>?")))
    assert example.regions is None and 3 not in example.ids.tolist()


def several(assistant: Assistant) -> list[Example]:
    """Questions about regions of one and of two pictures, and about none."""
    other = Image(PIL.Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 20, 3), dtype=np.uint8)))
    there = Region(Point(10, 30, Frame(20, 40)), 1)
    talks = [
        asked(PICTURE, Text("what is "), Region(Box(15, 0, 45, 30, FRAME)), answer="a cat"),
        asked(PICTURE, Text("what is this?"), answer="a region"),
        asked(PICTURE, other, Text("what is "), there, Text(" or "), Region(Point(5, 5, FRAME)), answer="a cat"),
    ]
    return [assistant.engine.processor(talk) for talk in talks]


@torch.no_grad()
def test_however_regions_are_read_the_numbers_are_the_same(assistants: dict[str, Assistant]) -> None:
    assistant = assistants["ferret"]
    model, examples = assistant.published.model, several(assistant)
    alone = [model(collate([example], 7, 0))[0] for example in examples]
    for side in ("left", "right"):
        together = collate(examples, 7, 0, side)  # type: ignore[arg-type]
        hidden = model(together)
        for row, wanted in enumerate(alone):
            found = hidden[row][together.layout.document[row] >= 0]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    packed = pack(examples, 7, 0, sum(example.length for example in examples))
    hidden = model(packed)[0]
    longest_first = sorted(range(3), key=lambda i: -examples[i].length)
    for document, i in enumerate(longest_first):
        found = hidden[packed.layout.document[0] == document]
        torch.testing.assert_close(found, alone[i], atol=1e-5, rtol=1e-4)
    twin, rough = prepared(model), prepared(model, "bf16")
    torch.testing.assert_close(twin(collate(examples[:1], 7, 0))[0], alone[0], atol=1e-4, rtol=1e-4)
    near = rough(collate(examples[:1], 7, 0))[0].float()
    assert float((near - alone[0]).norm() / alone[0].norm()) < 0.1


def test_folders_answer_about_regions(assistants: dict[str, Assistant], family: str) -> None:
    """Questions that begin alike, of different regions, are each answered as if asked alone."""
    assistant, few = assistants[family], Sampling(max_new_tokens=4)
    shapes = (Box(15, 0, 45, 30, FRAME), Box(0, 0, 9, 9, FRAME), Point(50, 20, FRAME))
    talks = [asked(PICTURE, Text("what is "), Region(shape)) for shape in shapes]
    answers = assistant.answer(talks, few)
    assert [answer.error for answer in answers] == [None] * 3
    assert [a.text for a in answers] == [assistant.answer([talk], few)[0].text for talk in talks]
    assert answers[0].usage["image_tokens"] == 16


def test_regions_that_have_no_picture_or_are_learned_side_by_side_are_refused(assistants: dict[str, Assistant]) -> None:
    processor = assistants["ferret"].engine.processor
    box = Region(Box(15, 0, 45, 30, FRAME))
    with pytest.raises(InputError, match="region is referred to in a picture"):
        processor(asked(Text("what is "), box))
    with pytest.raises(InputError, match="a place in image 2 of a conversation with 1"):
        processor(asked(PICTURE, replace(box, image=1)))
    turns = asked(PICTURE, Text("what is "), box, answer="a cat") + asked(Text("what?"), answer="a region")
    with pytest.raises(InputError, match="learned one at a time"):
        processor.branches(turns)
    engine = assistants["ferret"].engine
    plain = Engine(engine.model, engine.processor).answer([asked(Text("what?"))], Sampling(max_new_tokens=2))
    assert plain[0].error is None


def test_published_inputs_that_do_not_match_are_told(assistants: dict[str, Assistant]) -> None:
    ids = torch.tensor([[1, *[-200] * 16, 7, 3, 9]])
    pixels, mask = torch.zeros(1, 3, 28, 28), torch.ones(30, 20)
    ferret_, shikra_ = assistants["ferret"], assistants["shikra"]
    assert ferret_.logits(input_ids=ids, images=pixels, region_masks=[[mask]]).shape == (1, 20, 503)
    for masks in (None, [[mask, mask]], [[], [mask]]):
        with pytest.raises(InputError, match="1 <region_fea> in input_ids for"):
            ferret_.logits(input_ids=ids, images=pixels, region_masks=masks)
    ids = torch.tensor([[1, 501, *[500] * 16, 502, 7]])
    assert shikra_.logits(input_ids=ids, images=pixels).shape == (1, 20, 503)
    with pytest.raises(InputError, match="15 <im_patch> in input_ids, the pictures need 16"):
        shikra_.logits(input_ids=torch.tensor([[1, 501, *[500] * 15, 502, 7]]), images=pixels)
    with pytest.raises(InputError, match="neither <im_start> nor <im_patch>"):
        shikra_.logits(input_ids=torch.tensor([[1, 501, *[500] * 15, 502, 500]]), images=pixels)


def test_names_read_both_ways(assistants: dict[str, Assistant], family: str, tmp_path: Path) -> None:
    published = assistants[family].published
    published.save(tmp_path / "again")
    write(tmp_path / "again" / "tower", {"unused": torch.zeros(1)}, VISION)
    again = sightline.load(tmp_path / "again").published.model
    wanted = published.model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == family


@pytest.mark.parametrize("name, sampler", [("shikra-7b", 0), ("ferret-7b", 44_069_900), ("ferret-13b", 45_119_500)])
def test_rows_have_the_published_sizes(name: str, sampler: int) -> None:
    cfg: Any = ROWS[name].model
    with torch.device("meta"):
        found = 0 if cfg.regions is None else sum(p.numel() for p in RegionSampler(cfg.regions).parameters())
    assert found == sampler
    assert cfg.fusion.layers == 1 and cfg.decoder.max_length == 2048


def test_a_ferret_without_its_sampler_is_told() -> None:
    c = {**ROWS["ferret-7b"].config, "region_geo_sampler": False}
    with pytest.raises(ConfigError, match="expected its sampler"):
        ferret.config(c, Path())
