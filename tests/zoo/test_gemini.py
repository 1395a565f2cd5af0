"""A native mixture of experts over text, pictures, films and sounds: every way to read it gives the same numbers."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from sightline.core.config import from_dict, to_dict
from sightline.core.errors import InputError
from sightline.core.layout import Medium
from sightline.core.sequence import Audio, Conversation, Image, Message, Part, Text, Video
from sightline.data.batch import IGNORE, Batch, Example, collate, pack
from sightline.data.images import Square
from sightline.data.processor import Processor
from sightline.data.template import clock
from sightline.language.tokenizer import Tokenizer, train_tokenizer
from sightline.model import VLM, VLMConfig
from sightline.serving.engine import Engine
from sightline.serving.sampling import Sampling
from sightline.training.objectives import NextToken
from sightline.training.recipe import Recipe, Stage
from sightline.training.run import CONTROLS, run
from sightline.training.sources import ScenesSource
from sightline.training.trainer import Trainer
from sightline.zoo import gemini, own
from sightline.zoo.describe import describe
from sightline.zoo.prepared import prepared

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
SETTINGS = own.ProcessorConfig(Square(32), template="interleaved", codec=None, max_length=512)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["how many? two where what do you hear?"] * 30
    return train_tokenizer(texts, 480, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> VLMConfig:
    """Pictures of 16 tokens; a second of sound is 50, and 60 of them are heard at a time."""
    sound = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    return gemini.config(
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 480,
            "max_position_embeddings": 512, "rope_theta": 1e4, "image_size": 32, "patch_size": 8,
            "audio_config": {**sound, "num_mel_bins": 16, "max_source_positions": 60},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(config: VLMConfig) -> VLM:
    """Weights that are exact in bfloat16, so large that all that is read counts."""
    model, generator = VLM(config).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.4).bfloat16())
        for buffer in model.buffers():
            buffer.copy_(buffer.bfloat16())
    return model


@pytest.fixture(scope="module")
def processor(model: VLM, tokenizer: Tokenizer) -> Processor:
    return SETTINGS.build(tokenizer, model)


def picture(seed: int) -> Image:
    return Image(PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)))


def sound(seconds: float, seed: int = 0) -> Audio:
    samples = np.random.default_rng(seed).uniform(-1, 1, int(seconds * 16_000)).astype(np.float32)
    return Audio(samples, 16_000)


def talk(*parts: Part, words: str = "how many?", answer: str = "two where") -> Conversation:
    return Message("user", (*parts, Text(words))), Message("assistant", (Text(answer),))


FILM = Video((picture(1), picture(2)), (0.0, 61.5))
TALKS = {
    "text": talk(),
    "picture": talk(picture(0)),
    "film": talk(FILM, answer="two"),
    "sound": talk(sound(0.5), words="what do you hear?"),
    "all": talk(Text("how"), picture(0), sound(1.6, 3), FILM, Text("where"), picture(4), sound(0.2, 5)),
}


@pytest.fixture(scope="module")
def examples(processor: Processor) -> dict[str, Example]:
    return {name: processor(conversation) for name, conversation in TALKS.items()}


def batch(processor: Processor, *examples: Example, side: str = "right") -> Batch:
    return collate(examples, 8, processor.tokenizer.control("<pad>"), side)  # type: ignore[arg-type]


@torch.no_grad()
def alone(model: VLM, processor: Processor, examples: dict[str, Example]) -> list[Tensor]:
    return [model(batch(processor, example))[0] for example in examples.values()]


def test_all_stands_where_it_was_said(processor: Processor, examples: dict[str, Example]) -> None:
    example = examples["all"]
    runs = [(medium, len(list(group))) for medium, group in itertools.groupby(example.medium.tolist())]
    media = [run for run in runs if run[0] != Medium.TEXT]
    pictures, sounds = (Medium.IMAGE, 16), Medium.AUDIO
    assert media == [pictures, (sounds, 100), pictures, pictures, pictures, (sounds, 50)]
    assert example.sounds is not None
    assert bool((example.medium[example.sounds.slots] == Medium.AUDIO).all())
    assert example.sounds.frames.grids == ((120, 1, 1), (80, 1, 1), (100, 1, 1))  # two seconds in two pieces
    said = processor.tokenizer.decode(example.ids.tolist(), skip_control=False)
    first = "00:00.0 " + "<image>" * 16 + " 01:01.5 "
    assert first in said and said.index("how") < said.index(first) < said.index("where")


def test_times_are_told_to_the_tenth() -> None:
    told = ["00:00.0", "00:00.0", "00:00.1", "01:00.0", "60:05.2"]
    assert [clock(t) for t in (0, 0.04, 0.06, 59.96, 3605.21)] == told


@pytest.mark.parametrize("name", TALKS)
@torch.no_grad()
def test_cached_is_whole(model: VLM, processor: Processor, examples: dict[str, Example], name: str) -> None:
    example = examples[name]
    whole, cache = batch(processor, example), model.new_cache()
    start = int((example.labels != IGNORE).long().argmax()) + 1
    head = replace(whole, ids=whole.ids[:, :start], layout=whole.layout.span(0, start))
    out = [model(head, cache)]
    for t in range(start, example.length):
        step = Batch(whole.ids[:, t : t + 1], whole.layout.span(t, t + 1), torch.zeros(0, dtype=torch.int64))
        out.append(model(step, cache))
    torch.testing.assert_close(torch.cat(out, dim=1), model(whole), **CLOSE)


@torch.no_grad()
def test_packed_is_separate(model: VLM, processor: Processor, examples: dict[str, Example]) -> None:
    packed = pack(list(examples.values()), 8, processor.tokenizer.control("<pad>"), 400)
    assert len(packed.ids) < len(examples)
    hidden = model(packed)
    found = [hidden[r][packed.layout.document[r] == d] for r in range(len(hidden)) for d in range(len(examples))]
    for wanted in alone(model, processor, examples):
        assert sum(x.shape == wanted.shape and torch.allclose(x, wanted, **CLOSE) for x in found) == 1


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_batched_is_single(model: VLM, processor: Processor, examples: dict[str, Example], side: str) -> None:
    together = batch(processor, *examples.values(), side=side)
    hidden = model(together)
    for row, wanted in enumerate(alone(model, processor, examples)):
        torch.testing.assert_close(hidden[row][together.layout.document[row] >= 0], wanted, **CLOSE)


def test_answers_are_the_same_alone_together_and_prepared(model: VLM, processor: Processor) -> None:
    asked = [conversation[:1] for conversation in TALKS.values()]
    asked.append(talk(sound(0.5), words="how?")[:1])  # the same sound as another's
    few = Sampling(max_new_tokens=4)
    engine = Engine(model, processor)
    replies = engine.answer(asked, few)
    assert [reply.error for reply in replies] == [None] * len(asked)
    assert [r.ids for r in replies] == [engine.answer([one], few)[0].ids for one in asked]
    assert [r.ids for r in replies] == [r.ids for r in Engine(prepared(model), processor).answer(asked, few)]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@torch.no_grad()
def test_in_fewer_bits_it_reads_all_media(
    model: VLM, processor: Processor, examples: dict[str, Example], precision: str
) -> None:
    """A token may pass other experts then, so only a model without that choice is nearly the same."""
    read = batch(processor, *examples.values())
    twin = prepared(model, precision)  # type: ignore[arg-type]
    assert bool(torch.isfinite(twin.logits(twin(read))).all())
    dense = VLM(replace(model.config, decoder=replace(model.config.decoder, experts=None))).eval()
    shared = {name: tensor for name, tensor in model.state_dict().items() if name in dense.state_dict()}
    dense.load_state_dict(shared, strict=False)
    real = read.layout.document >= 0
    wanted, found = (each.logits(each(read))[real] for each in (dense, prepared(dense, precision)))  # type: ignore[arg-type]
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_text_alone_touches_nothing_of_pictures_and_sounds(
    model: VLM, processor: Processor, examples: dict[str, Example]
) -> None:
    assert model.audio is not None and model.audio_map is not None
    model.zero_grad()
    model(batch(processor, examples["text"])).sum().backward()
    senses = (model.encoder, model.audio, model.audio_map)
    assert all(p.grad is None for part in senses for p in part.parameters())
    model(batch(processor, examples["picture"])).sum().backward()
    assert all(p.grad is None for p in model.audio.parameters())
    assert model.encoder.patch.weight.grad is not None


def test_gradients_reach_pixels_samples_and_every_parameter(model: VLM, processor: Processor) -> None:
    samples = torch.randn(8000, requires_grad=True)
    example = processor(talk(picture(0), Audio(samples, 8_000), FILM))
    read = batch(processor, example)
    assert read.patches is not None
    read.patches.values.requires_grad_()
    model.zero_grad()
    learned = example.labels != IGNORE
    scores = model.logits(model(read))[0].log_softmax(-1)
    scores[learned, example.labels[learned]].sum().backward()
    for given in (read.patches.values, samples):
        assert given.grad is not None and float((given.grad != 0).float().mean()) > 0.99
    assert [name for name, p in model.named_parameters() if p.grad is None and ".experts." not in name] == []


def test_settings_and_a_saved_model_come_back(
    model: VLM, config: VLMConfig, tokenizer: Tokenizer, processor: Processor, tmp_path: Path
) -> None:
    assert from_dict(VLMConfig, to_dict(config)) == config
    own.save(model, tokenizer, SETTINGS, tmp_path / "saved")
    published, again = own.load(tmp_path / "saved")
    wanted, found = processor(TALKS["all"]), again(TALKS["all"])
    assert torch.equal(found.ids, wanted.ids)
    with torch.no_grad():
        read = published.model(batch(again, found))
        torch.testing.assert_close(read, model(batch(processor, wanted)), **CLOSE)


def tiny(config: VLMConfig, **stage: object) -> Recipe:
    learned = Stage("learn", {"*": 3e-3}, {"scenes": 1.0}, steps=1, batch=2, precision="fp32", warmup=0)
    sources = {"scenes": ScenesSource(kind="questions", turns=2)}
    recipe = Recipe("native", config, Square(32), sources, (replace(learned, **stage),), template="interleaved")  # type: ignore[arg-type]
    return replace(recipe, vocabulary=480, max_length=512)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recipe_trains_it(config: VLMConfig, tokenizer: Tokenizer, tmp_path: Path, precision: str) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    learn = {"encoder.*": 1e-3, "decoder.*": 1e-3}
    (step,) = run(tiny(config, learn=learn, precision=precision), tmp_path, workers=0)
    assert step.applied and 1 < step.loss < 20


def test_it_learns_what_it_hears_and_sees(config: VLMConfig, processor: Processor, tmp_path: Path) -> None:
    """Two sounds and two films told apart by nothing else."""
    torch.manual_seed(0)
    recipe = tiny(config, steps=60, learn={"*": 1e-2})
    low, high = (Audio(np.sin(np.arange(4000) * pitch).astype(np.float32), 16_000) for pitch in (0.1, 0.8))
    red, blue = (Image(PIL.Image.new("RGB", (32, 32), color)) for color in ("red", "blue"))
    talks = [talk(low, answer="two"), talk(high, answer="where")]
    talks += [talk(Video(frames, (0.0, 1.0)), answer=a) for frames, a in (((red, blue), "two"), ((blue, red), "where"))]
    micro = batch(processor, *(processor(each) for each in talks))
    trainer = Trainer(recipe, recipe.stages[0], VLM(config), NextToken(), tmp_path)
    steps = [trainer.learn([micro]) for _ in range(60)]
    assert steps[-1].loss < 0.1 < steps[0].loss


def test_a_model_without_ears_says_so(tokenizer: Tokenizer, config: VLMConfig) -> None:
    deaf = SETTINGS.build(tokenizer, VLM(replace(config, audio=None)))
    with pytest.raises(InputError, match="this model reads text and images, not audio"):
        deaf(TALKS["sound"])


def test_its_row_is_described() -> None:
    row = gemini.GEMINI
    told = describe(row.name, row.model, row.stages)
    assert told.visual_tokens == 256
    assert list(told.parameters) == ["encoder", "fusion", "decoder", "audio", "audio_map"]
    assert sum(told.parameters.values()) == told.trained["pretrain"]
    assert 47e9 < told.parameters["decoder"] < 50e9
