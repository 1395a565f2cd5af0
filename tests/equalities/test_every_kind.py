"""Models of every kind that a configuration can name: kept whole in a folder, and read the same however they are read.

Each is one of this project's own, small, with random weights that are exact in bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from sightline.core.errors import InputError
from sightline.core.geometry import Box, Frame
from sightline.core.sequence import Audio, Conversation, Image, Message, Part, Region, Text, Video
from sightline.data.batch import Batch, Example, collate, pack
from sightline.data.images import Square
from sightline.data.native_resolution import NativeResolution
from sightline.data.processor import Processor
from sightline.data.template import Segment, Writer
from sightline.data.tiles import AnyResolution, Canvas, Pipeline, Tiles
from sightline.encoders.audio import AudioConfig
from sightline.encoders.vit import TilesConfig, ViTConfig
from sightline.encoders.vq import VQConfig
from sightline.fusion.anyres import AnyResConfig
from sightline.fusion.cross_attention import CrossAttentionConfig
from sightline.fusion.glu import GLUConfig
from sightline.fusion.pooling import LatentPoolConfig, PositionPoolConfig, SizedPoolConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.qformer import QFormerConfig
from sightline.fusion.visual_expert import VisualExpertConfig
from sightline.fusion.vocabulary import VocabularyConfig
from sightline.grounding.codecs import LocationTokens
from sightline.grounding.heads import BoxHeadConfig
from sightline.grounding.sampler import SamplerConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.seq2seq import Seq2SeqConfig
from sightline.language.tokenizer import Tokenizer, train_tokenizer
from sightline.layers.packed import Precision
from sightline.model import VLM, VLMConfig
from sightline.serving.engine import Engine
from sightline.serving.sampling import Sampling
from sightline.training.budget import recompute
from sightline.training.features import FeatureStore
from sightline.training.objectives import NextToken
from sightline.zoo import own

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
CONTROLS = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>", "<region_fea>", *LocationTokens().names)
VOCABULARY = 460
IMAGE = ViTConfig(image_size=16, patch_size=8, width=24, depth=1, heads=2, mlp=32)
ANY_SIZE = ViTConfig(
    image_size=16,
    patch_size=8,
    width=24,
    depth=1,
    heads=2,
    mlp=32,
    temporal_patch_size=2,
    positions="none",
    rope_theta=10_000.0,
)
TILED = ViTConfig(
    image_size=16,
    patch_size=8,
    width=24,
    depth=1,
    heads=2,
    mlp=32,
    class_token=True,
    pre_norm=True,
    keep_prefix=True,
    tiles=TilesConfig(((1, 1), (1, 2), (2, 1)), 1),
)
TEXT = DecoderConfig(vocab_size=VOCABULARY, width=32, depth=2, heads=4, kv_heads=2, mlp=48, max_length=320)
AXES = DecoderConfig(
    vocab_size=VOCABULARY, width=32, depth=2, heads=4, kv_heads=2, mlp=48, max_length=320, mrope_section=(2, 1, 1)
)
BESIDE = Seq2SeqConfig(VOCABULARY, 32, 2, 2, 4, 8, 48)
MLP = ProjectorConfig(inputs=24, width=32)


@dataclass(frozen=True)
class Kind:
    """A model's settings, its picture pipeline and how it is talked to."""

    model: VLMConfig
    pixels: Pipeline = Square(16)  # noqa: RUF009 # a frozen value
    template: str = "sightline"
    codec: str | None = None
    hears: bool = False
    refers: bool = False
    one_answer: bool = False


KINDS = {
    "tiles": Kind(VLMConfig(IMAGE, MLP, TEXT), Tiles(16, max_tiles=3)),
    "canvas": Kind(VLMConfig(IMAGE, MLP, TEXT), Canvas(16, max_tiles=3)),
    "any-resolution": Kind(VLMConfig(IMAGE, AnyResConfig(MLP), TEXT), AnyResolution(16, ((1, 2), (2, 1), (2, 2)))),
    "axes": Kind(VLMConfig(ANY_SIZE, MLP, AXES, tokens_per_second=2.0), NativeResolution(8, 2, (64, 900), (64, 600))),
    "folded axes": Kind(
        VLMConfig(ANY_SIZE, ProjectorConfig(inputs=24, width=32, shuffle=2), AXES),
        NativeResolution(16, 2, (256, 1200), (256, 600)),
    ),
    "tiled encoder": Kind(
        VLMConfig(
            TILED,
            CrossAttentionConfig(
                inputs=24, width=32, heads=4, mlp=48, resampler=MLP, interval=1, start=0, adjacent=True
            ),
            TEXT,
        ),
        Canvas(16, max_tiles=2, enlarged=True, cut=False),
    ),
    "encoder-decoder": Kind(VLMConfig(IMAGE, MLP, BESIDE), one_answer=True),
    "encoder-decoder of tiles": Kind(
        VLMConfig(IMAGE, AnyResConfig(MLP), BESIDE), AnyResolution(16, ((1, 2), (2, 1))), one_answer=True
    ),
    "q-former": Kind(VLMConfig(IMAGE, QFormerConfig(24, 32, queries=4, hidden=16, depth=2, heads=2, mlp=24), TEXT)),
    "q-former that reads": Kind(
        VLMConfig(
            IMAGE,
            QFormerConfig(24, 32, queries=4, hidden=16, depth=2, heads=2, mlp=24, vocab_size=VOCABULARY),
            TEXT,
        ),
        Tiles(16, max_tiles=3),
        one_answer=True,
    ),
    "q-former of an encoder-decoder": Kind(
        VLMConfig(
            IMAGE,
            QFormerConfig(24, 32, queries=4, hidden=16, depth=2, heads=2, mlp=24, vocab_size=VOCABULARY),
            BESIDE,
        ),
        one_answer=True,
    ),
    "codes": Kind(
        VLMConfig(
            VQConfig(16, width=32, multipliers=(1, 1), depth=1, latent=8, codes=20, code_width=8),
            VocabularyConfig(tuple(range(400, 420))),
            TEXT,
        )
    ),
    "position pool": Kind(VLMConfig(IMAGE, PositionPoolConfig(24, 32, 4, side=2), TEXT)),
    "latent pool": Kind(VLMConfig(IMAGE, LatentPoolConfig(24, 32, 4, queries=3), TEXT)),
    "sized pool": Kind(VLMConfig(IMAGE, SizedPoolConfig(24, 32, 4, {4: 3}), TEXT)),
    "sounds": Kind(
        VLMConfig(IMAGE, MLP, TEXT, audio=AudioConfig(16, 1, 2, 24, bins=8, positions=50)),
        template="interleaved",
        hears=True,
    ),
    "sounds of an encoder-decoder": Kind(
        VLMConfig(IMAGE, MLP, BESIDE, audio=AudioConfig(16, 1, 2, 24, bins=8, positions=50)),
        template="interleaved",
        hears=True,
        one_answer=True,
    ),
    "sounds in a prefix": Kind(
        VLMConfig(IMAGE, MLP, TEXT, "prefix", audio=AudioConfig(16, 1, 2, 24, bins=8, positions=50)),
        Tiles(16, max_tiles=3),
        template="interleaved",
        hears=True,
        one_answer=True,
    ),
    "sounds on axes": Kind(
        VLMConfig(ANY_SIZE, MLP, AXES, audio=AudioConfig(16, 1, 2, 24, bins=8, positions=50)),
        NativeResolution(8, 2, (64, 900), (64, 600)),
        template="interleaved",
        hears=True,
    ),
    "sounds beside cross-attention": Kind(
        VLMConfig(
            IMAGE,
            CrossAttentionConfig(inputs=24, width=32, heads=4, mlp=48, resampler=MLP, interval=1, start=0),
            TEXT,
            audio=AudioConfig(16, 1, 2, 24, bins=8, positions=50),
        ),
        Tiles(16, max_tiles=3),
        template="interleaved",
        hears=True,
    ),
    "experts of tiles": Kind(
        VLMConfig(
            IMAGE,
            VisualExpertConfig(GLUConfig(inputs=24, width=32, hidden=40)),
            TEXT,
            audio=AudioConfig(16, 1, 2, 24, bins=8, positions=50),
        ),
        Tiles(16, max_tiles=3),
        template="interleaved",
        hears=True,
    ),
    "regions of an encoder-decoder": Kind(
        VLMConfig(IMAGE, MLP, BESIDE, regions=SamplerConfig(24, 32, 16, (8, 4), (4, 4))),
        codec="ferret",
        refers=True,
        one_answer=True,
    ),
    "regions": Kind(
        VLMConfig(IMAGE, MLP, TEXT, regions=SamplerConfig(24, 32, 16, (8, 4), (4, 4))), codec="ferret", refers=True
    ),
    "regions on axes": Kind(
        VLMConfig(ANY_SIZE, MLP, AXES, regions=SamplerConfig(24, 32, 16, (8, 4), (4, 4))),
        NativeResolution(8, 2, (64, 900), (64, 600)),
        codec="ferret",
        refers=True,
    ),
    "box head": Kind(
        VLMConfig(IMAGE, MLP, TEXT, box_head=BoxHeadConfig(32, 16)), Tiles(16, max_tiles=3), codec="location-tokens"
    ),
    "box head of an encoder-decoder": Kind(
        VLMConfig(IMAGE, MLP, BESIDE, box_head=BoxHeadConfig(32, 16)), codec="location-tokens", one_answer=True
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = ["how many? two where what is this or that a cat"] * 30
    return train_tokenizer(words, VOCABULARY, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")


@dataclass(frozen=True)
class Made:
    """A kind with weights."""

    kind: Kind
    model: VLM
    settings: own.ProcessorConfig
    processor: Processor
    tokenizer: Tokenizer


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Made:
    kind = KINDS[request.param]
    model, generator = VLM(kind.model).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.3).bfloat16())
        for buffer in model.buffers():
            buffer.copy_(buffer.bfloat16())
    settings = own.ProcessorConfig(kind.pixels, kind.template, kind.codec, max_length=320)
    return Made(kind, model, settings, settings.build(tokenizer, model), tokenizer)


def picture(width: int, height: int, seed: int = 0) -> Image:
    return Image(PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)))


WIDE, TALL, SMALL = picture(40, 20), picture(18, 30, 1), picture(16, 16, 2)
FILM = Video((picture(24, 16, 3), picture(24, 16, 4)), (0.0, 1.5))
SOUND = Audio(np.random.default_rng(5).uniform(-1, 1, 12_000).astype(np.float32), 16_000)


def asked(*parts: Part, answer: str | None = None) -> Conversation:
    """A question of some parts, with its answer."""
    user = Message("user", parts)
    return (user,) if answer is None else (user, Message("assistant", (Text(answer),)))


def talks(kind: Kind, answer: str | None = None) -> list[Conversation]:
    """Questions about the same pictures, others, a film and nothing, some of which begin alike."""
    found = [
        asked(WIDE, Text("how many?"), answer=answer),
        asked(WIDE, Text("where is this or that?"), answer=answer),
        asked(TALL, Text("how many?"), answer=answer),
        asked(TALL, Text("what?"), answer=answer),
        asked(Text("how many many many?"), answer=answer),
        asked(SMALL, WIDE, Text("what is this?"), answer=answer),
        asked(FILM, Text("what is that?"), answer=answer),
    ]
    if kind.hears:
        found += [
            asked(SOUND, Text("what is this?"), answer=answer),
            asked(WIDE, SOUND, Text("how many?"), answer=answer),
        ]
        found += [asked(WIDE, SOUND, Text("what?"), answer=answer)]
    if kind.refers:
        here = Region(Box(2, 3, 20, 15, Frame(40, 20)))
        there = Region(Box(3, 3, 15, 25, Frame(18, 30)), 1)
        found += [asked(WIDE, Text("what is "), here, Text("?"), answer=answer)]
        found += [asked(WIDE, TALL, Text("what is "), there, Text("or "), here, Text("?"), answer=answer)]
    if kind.model.box_head is not None and answer is not None:
        place = Region(Box(2, 3, 20, 15, Frame(40, 20), "a cat"))
        found += [(*asked(WIDE, Text("where?")), Message("assistant", (place,)))]
    return found


def alone(made: Made, examples: Sequence[Example]) -> list[Tensor]:
    """Hidden states of each, read by itself."""
    return [made.model(collate([example], made.processor.patch, 0))[0] for example in examples]


def test_it_is_kept_whole_in_a_folder(made: Made, tmp_path: Path) -> None:
    own.save(made.model, made.tokenizer, made.settings, tmp_path / "model")
    published, processor = own.load(tmp_path / "model")
    assert isinstance(published.model, VLM)
    assert published.model.config == made.model.config
    talk = talks(made.kind, "a cat")[0]
    first, second = made.processor(talk), processor(talk)
    assert torch.equal(first.ids, second.ids)
    found, wanted = (
        model(collate([e], processor.patch, 0)) for model, e in ((published.model, second), (made.model, first))
    )
    torch.testing.assert_close(found, wanted, **CLOSE)
    runners = (made.model, published.runner)
    answers = [Engine(model, processor).answer(talks(made.kind), Sampling(max_new_tokens=4)) for model in runners]  # type: ignore[arg-type]
    assert [reply.ids for reply in answers[0]] == [reply.ids for reply in answers[1]]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_it_is_read_in_other_precisions(made: Made, tmp_path: Path, precision: Precision) -> None:
    own.save(made.model, made.tokenizer, made.settings, tmp_path / "model")
    published, processor = own.load(tmp_path / "model", precision)
    assert isinstance(published.runner, VLM)
    for talk in talks(made.kind):
        batch = collate([processor(talk)], processor.patch, 0)
        wanted, found = made.model(batch)[0].float(), published.runner(batch)[0].float()
        assert torch.cosine_similarity(wanted.flatten(), found.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("way", ["left", "right", "packed"])
@torch.no_grad()
def test_together_is_alone(made: Made, way: str) -> None:
    examples = [made.processor(talk) for talk in talks(made.kind, "a cat")]
    patch = made.processor.patch
    if way == "packed":
        examples.sort(key=lambda e: (-e.read.length,))
        batch = pack(examples, patch, 0, 40 + max(max(e.length, e.read.length) for e in examples))
        assert len(batch.ids) < len(examples)
    else:
        batch = collate(examples, patch, 0, way)  # type: ignore[arg-type]
    hidden = made.model(batch.to("cpu"))
    found = [
        hidden[row][batch.layout.document[row] == document]
        for row in range(len(batch.ids))
        for document in range(int(batch.layout.document[row].max()) + 1)
    ]
    wanted = alone(made, examples)
    assert len(found) == len(wanted)
    for each in wanted:
        assert sum(x.shape == each.shape and torch.allclose(x, each, **CLOSE) for x in found) >= 1


@pytest.mark.parametrize("made", [n for n, kind in KINDS.items() if kind.model.box_head], indirect=True)
@torch.no_grad()
def test_what_is_learned_is_marked_where_it_stands(made: Made) -> None:
    """Targets of a head lie at the tokens that begin places, however examples are put together."""
    examples = [made.processor(talk) for talk in talks(made.kind, "a cat")]
    begins = made.tokenizer.control("<box>")
    patch, most = made.processor.patch, 60 + max(max(e.length, e.read.length) for e in examples)
    for batch in (collate(examples, patch, 0), collate(examples, patch, 0, "left"), pack(examples, patch, 0, most)):
        assert batch.places is not None
        assert batch.ids.flatten()[batch.places.slots].tolist() == [begins]


def test_questions_together_are_answered_as_alone(made: Made) -> None:
    engine, sampling = Engine(made.model, made.processor), Sampling(max_new_tokens=5)
    asked_ = talks(made.kind)
    together = engine.answer(asked_, sampling)
    for talk, reply in zip(asked_, together, strict=True):
        if reply.error is not None:
            raise reply.error
        (single,) = engine.answer([talk], sampling)
        assert reply.ids == single.ids
        assert reply.probabilities == pytest.approx(single.probabilities, abs=1e-4)
        assert reply.usage == single.usage


@pytest.mark.parametrize("made", [n for n, kind in KINDS.items() if not kind.one_answer], indirect=True)
@torch.no_grad()
def test_branches_are_separate_questions(made: Made) -> None:
    first, second = (talk for talk in talks(made.kind, "a cat")[:2])
    joined = (*first, Message("user", second[0].parts[1:]), second[1])
    together = made.processor.branches(joined)
    separate = [made.processor(talk) for talk in (first, second)]
    learned = [example.labels != -100 for example in (together, *separate)]
    found = alone(made, [together, *separate])
    wanted = torch.cat([hidden[here] for hidden, here in zip(found[1:], learned[1:], strict=True)])
    torch.testing.assert_close(found[0][learned[0]], wanted, **CLOSE)


def whole_films(talk: Conversation) -> list[Segment]:
    """A form in which a film has one place."""
    out = Writer()
    for part in talk[0].parts:
        if isinstance(part, Video):
            out.image()
        else:
            out.parts(Message("user", (part,)))
    return out.segments


def learned(model: VLM, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch, and the gradients of all that it reaches."""
    model.zero_grad(set_to_none=True)
    ((total, count),) = NextToken()(model, batch).values()
    (total / count).backward()
    return float(total / count), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_its_blocks_are_computed_again_for_the_same_gradients(made: Made) -> None:
    batch = collate([made.processor(talk) for talk in talks(made.kind, "a cat")], made.processor.patch, 0)
    loss, wanted = learned(made.model, batch)
    again = VLM(made.model.config).eval()
    again.load_state_dict(made.model.state_dict())
    recompute(again)
    other, found = learned(again, batch)
    assert other == loss and set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in found)


def test_features_that_are_kept_teach_the_same(made: Made, tmp_path: Path) -> None:
    """Computed, read again, and some of each."""
    examples = [made.processor(talk) for talk in talks(made.kind, "a cat")]
    whole, some = (collate(part, made.processor.patch, 0) for part in (examples, examples[:3]))
    frozen = VLM(made.model.config).eval()
    frozen.load_state_dict(made.model.state_dict())
    frozen.encoder.requires_grad_(False)
    loss, wanted = learned(frozen, whole)
    store = FeatureStore(tmp_path, 1 << 30)
    store.serve(frozen.encoder, made.kind.pixels)
    learned(frozen, some)
    for _ in range(2):
        other, found = learned(frozen, whole)
        assert other == pytest.approx(loss, rel=1e-5) and set(found) == set(wanted)
        for name, grad in found.items():
            torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-3, msg=name)
    assert store.hits > store.computed > 0


@pytest.mark.parametrize("made", ["regions on axes"], indirect=True)
def test_a_region_is_found_behind_a_film_that_is_one_item(made: Made) -> None:
    """Pictures are counted with a film's frames, items without."""
    processor = made.settings.build(made.tokenizer, made.model)
    processor.video_id = made.tokenizer.control("<image>")
    processor.template = whole_films
    here = Region(Box(2, 3, 20, 15, Frame(40, 20)), 2)
    found = processor(asked(FILM, WIDE, Text("what is "), here, Text("?")))
    assert len(found.pixels) == 2 and len(found.transforms) == 3
    assert found.regions is not None and found.regions.items.tolist() == [1]
    alone_ = processor(asked(WIDE, Text("what is "), replace(here, image=0), Text("?")))
    assert alone_.regions is not None and torch.equal(found.regions.points, alone_.regions.points)
    with pytest.raises(InputError, match="seen in one view"):
        processor(asked(FILM, WIDE, Text("what is "), Region(Box(2, 3, 20, 15, Frame(24, 16)), 1), Text("?")))
