"""Places as numbers: there and back through the picture's way, and learned from one picture."""

from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from torch.nn import functional as F

from sightline.core.errors import ConfigError
from sightline.core.geometry import Box, Frame, Point, Transform, generalized_iou, iou, pad, resize
from sightline.core.sequence import Image, Message, Region, Text, ask
from sightline.data.batch import IGNORE, Batch, Example, collate, pack
from sightline.data.images import PadSquare, Square
from sightline.data.processor import Processor
from sightline.encoders.vit import ViTConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.grounding.heads import BoxHeadConfig, PlaceTargets, place_loss, places_of, shares_of
from sightline.language.decoder import DecoderConfig
from sightline.language.tokenizer import Tokenizer, train_tokenizer
from sightline.model import VLM, VLMConfig
from sightline.serving.engine import Engine
from sightline.serving.sampling import Sampling
from sightline.training.recipe import Recipe, Stage
from sightline.training.run import CONTROLS, run
from sightline.training.sources import ScenesSource
from sightline.zoo.own import ProcessorConfig
from sightline.zoo.prepared import prepared

FRAME = Frame(60, 30)
CONFIG = VLMConfig(
    ViTConfig(image_size=32, patch_size=8, width=24, depth=1, heads=2, mlp=32),
    ProjectorConfig(inputs=24, width=32),
    DecoderConfig(vocab_size=480, width=32, depth=2, heads=2, mlp=48, max_length=512),
    box_head=BoxHeadConfig(width=32, hidden=32),
)


def padded() -> Transform:
    step = pad(FRAME, 0, 15, 60, 60)
    return Transform(FRAME, (step, resize(step.target, 32, 32)))


def test_places_come_back_in_pixels() -> None:
    places = [Box(6, 3, 24, 30, FRAME), Point(45, 15, FRAME), Box(0, 0, 60, 30, FRAME)]
    shares, boxes = shares_of(places, padded())
    assert boxes.tolist() == [True, False, True]
    torch.testing.assert_close(shares[0], torch.tensor([0.25, (3 + 30) / 120 + 0.25, 0.3, 0.45]))
    torch.testing.assert_close(shares[1], torch.tensor([0.75, 0.5, 0.0, 0.0]))
    for place, found in zip(places, places_of(shares, boxes, padded(), "it"), strict=True):
        assert type(found) is type(place) and found.frame == FRAME and found.label == "it"
        numbers = (found.xyxy, place.xyxy) if isinstance(found, Box) else ((found.x, found.y), (place.x, place.y))  # type: ignore[union-attr]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)


def test_generalised_iou_is_iou_less_the_gap() -> None:
    a, b = Box(0, 0, 4, 4, FRAME), Box(2, 2, 6, 6, FRAME)
    apart = torch.tensor([10.0, 0, 12, 4])
    found = generalized_iou(torch.tensor([a.xyxy, a.xyxy]), torch.stack((torch.tensor(b.xyxy), apart)))
    assert found.tolist() == pytest.approx([iou(a, b) - (36 - 28) / 36, -(48 - 24) / 48])


def test_the_loss_of_a_point_asks_for_no_sides_and_none_is_lost_where_all_is_right() -> None:
    truth = PlaceTargets(
        torch.arange(2), torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.0, 0.0]]), torch.tensor([True, False])
    )
    right = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.9, 0.9]])
    torch.testing.assert_close(place_loss(right, truth), torch.zeros(2), atol=1e-5, rtol=0)
    wrong = torch.tensor([[0.9, 0.9, 0.2, 0.2], [0.3, 0.4, 0.0, 0.0]])
    torch.testing.assert_close(place_loss(wrong, truth)[1], torch.tensor(0.5))
    assert float(place_loss(wrong, truth)[0]) > 5 * 0.8 + 2  # farther than none shared


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["where is it? red"] * 30, 480, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")


@pytest.fixture
def processor(tokenizer: Tokenizer) -> Processor:
    return ProcessorConfig(PadSquare(32), max_length=512).build(tokenizer, VLM(CONFIG))


def example(processor: Processor, *places: Box | Point) -> Example:
    picture = PIL.Image.new("RGB", (60, 30), "red")
    answer = Message("assistant", tuple(Region(place) for place in places))
    return processor((Message("user", (Image(picture), Text("where is it?"))), answer))


def test_each_place_of_an_answer_is_known_where_it_begins(processor: Processor, tokenizer: Tokenizer) -> None:
    one = example(processor, Box(6, 3, 24, 30, FRAME, "red"), Point(45, 15, FRAME, "it"))
    two = example(processor, Box(0, 0, 60, 30, FRAME))
    assert one.places is not None and two.places is not None
    names = [tokenizer.control(name) for name in ("<box>", "<point>", "<box>")]
    for batch in (collate([one, two], 8, 0), pack([one, two], 8, 0, one.length + two.length)):
        assert batch.places is not None
        assert batch.ids.flatten()[batch.places.slots].tolist() == names
        torch.testing.assert_close(batch.places.shares, torch.cat((one.places.shares, two.places.shares)))


def test_in_branches_places_are_known_too(processor: Processor, tokenizer: Tokenizer) -> None:
    first = Box(6, 3, 24, 30, FRAME), Box(0, 0, 60, 30, FRAME)
    talk = [Message("user", (Image(PIL.Image.new("RGB", (60, 30))), Text("where is it?")))]
    talk += [Message("assistant", (Region(first[0]),)), Message("user", (Text("red?"),))]
    found = processor.branches((*talk, Message("assistant", (Region(first[1]),))))
    assert found.places is not None
    assert found.ids[found.places.slots].tolist() == [tokenizer.control("<box>")] * 2
    wanted, _ = shares_of(first, found.transforms[0])
    torch.testing.assert_close(found.places.shares, wanted)


def test_it_learns_one_picture_s_box(processor: Processor) -> None:
    """Read at the token that begins the box, in pixels of the original."""
    torch.manual_seed(0)
    model, box = VLM(CONFIG), Box(6, 3, 24, 30, FRAME)
    one = example(processor, box)
    batch: Batch = collate([one], 8, 0)
    assert batch.places is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        place_loss(model.places(model(batch, rows=batch.places.slots)), batch.places).sum().backward()
        optimizer.step()
    with torch.no_grad():
        shares = model.places(model(batch, rows=batch.places.slots))
    (found,) = places_of(shares, batch.places.boxes, one.transforms[0])
    assert isinstance(found, Box) and iou(found, box) > 0.9


def test_an_answer_s_box_is_what_the_head_reads(processor: Processor) -> None:
    """Tokens say where to the nearest of 128 places; the head to a fraction of a pixel, also where it is packed."""
    torch.manual_seed(0)
    model, box = VLM(CONFIG), Box(6, 3, 24, 30, FRAME, " red")
    one = example(processor, box)
    batch: Batch = collate([one], 8, 0)
    assert batch.places is not None and batch.labels is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        hidden = model(batch)
        words = F.cross_entropy(model.logits(hidden)[0], batch.labels[0], ignore_index=IGNORE)
        found = model.places(hidden.flatten(0, 1)[batch.places.slots])
        (words + place_loss(found, batch.places).sum()).backward()
        optimizer.step()
    picture = Image(PIL.Image.new("RGB", (60, 30), "red"))
    for ready in (model.eval(), prepared(model)):
        (reply,) = Engine(ready, processor).answer([ask("where is it?", picture)], Sampling(max_new_tokens=12))
        (answered,) = reply.grounded.boxes
        (said,) = processor.read(reply.ids, one.transforms).boxes
        with torch.no_grad():
            shares = model.places(model(batch, rows=batch.places.slots))
        (wanted,) = places_of(shares, batch.places.boxes, one.transforms[0])
        assert isinstance(wanted, Box) and answered.xyxy == pytest.approx(wanted.xyxy, abs=1e-2)
        assert answered.xyxy != said.xyxy and iou(answered, said) > 0.7 and answered.label == said.label == "red"


def test_a_stage_learns_places_by_the_name_box_head(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    stage = Stage(
        "place", {"*": 1e-3}, {"scenes": 1.0}, steps=1, batch=2, objective={"next-token": 1.0, "box-head": 0.5}
    )
    source = ScenesSource(kind="plain", turns=2, asks=("locate",))
    recipe = Recipe(
        "boxes", CONFIG, Square(32), {"scenes": source}, (replace(stage, precision="fp32"),), vocabulary=480
    )
    (step,) = run(recipe, tmp_path, workers=0)
    assert step.applied and 0 < step.terms["box-head"] < 10


def test_a_model_without_the_head_and_a_head_without_its_tokens_are_told(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no head that reads places"):
        VLM(replace(CONFIG, box_head=None)).places(torch.zeros(1, 32))
    with pytest.raises(ConfigError, match="which location-tokens have"):
        ProcessorConfig(Square(32), codec="decimals").build(tokenizer, VLM(CONFIG))
    with pytest.raises(ConfigError, match="box_head reads 31 numbers, expected the decoder's 32"):
        replace(CONFIG, box_head=BoxHeadConfig(width=31, hidden=32))
    with pytest.raises(ConfigError, match="at least 1 of both"):
        BoxHeadConfig(width=32, hidden=32, layers=0)
