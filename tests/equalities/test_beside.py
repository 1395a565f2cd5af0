"""What is written beside what is read: however a model with an encoder of text is asked, its numbers are the same."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.core.config import from_dict, to_dict
from sightline.core.errors import ConfigError, InputError
from sightline.core.sequence import ask
from sightline.data.batch import IGNORE, Batch, Example, collate, pack
from sightline.data.images import Square
from sightline.data.processor import Processor
from sightline.encoders.vit import ViTConfig
from sightline.fusion.cross_attention import CrossAttentionConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.qformer import QFormerConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.seq2seq import Seq2SeqConfig
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM, FusionConfig, VLMConfig
from sightline.serving.engine import Engine
from sightline.serving.sampling import Sampling
from sightline.training.objectives import NextToken
from sightline.zoo import own
from sightline.zoo.describe import QUESTION, describe
from sightline.zoo.prepared import prepared
from sightline.zoo.published import Published

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
NO_SLOTS = torch.zeros(0, dtype=torch.int64)
SETTINGS = own.ProcessorConfig(Square(32), codec=None, max_length=256)
IMAGE = ViTConfig(image_size=32, patch_size=8, width=24, depth=2, heads=2, mlp=32, stem=(8,))
QFORMER: Any = {"inputs": 24, "width": 32, "queries": 3, "hidden": 16, "depth": 2, "heads": 2, "mlp": 24}
FUSIONS: dict[str, FusionConfig] = {
    "projected": ProjectorConfig(inputs=24, width=32, shuffle=2),
    "asked": QFormerConfig(**QFORMER, vocab_size=300, max_length=64),
}
SHORT = Sampling(max_new_tokens=5)


@dataclass(frozen=True)
class Beside:
    """A model, its processor, and what every equality does."""

    model: VLM
    tokenizer: Tokenizer
    pictures: Callable[..., Any]

    @property
    def processor(self) -> Processor:
        return SETTINGS.build(self.tokenizer, self.model)

    def question(self, images: int, words: str, answer: str | None = None, seed: int = 0) -> Example:
        return self.processor(ask(words, *self.pictures(images, seed), answer=answer))

    def mixed(self) -> list[Example]:
        """Questions of several lengths about no, one and two pictures, with answers of several lengths."""
        return [
            self.question(1, "how many?", "two"),
            self.question(0, "where where where?", "two two two"),
            self.question(2, "how?", "where", seed=5),
            self.question(1, "how many many?", "two where how many", seed=9),
        ]

    def batch(self, *examples: Example, side: str = "right") -> Batch:
        return collate(examples, 8, self.tokenizer.control("<pad>"), side)  # type: ignore[arg-type]

    def alone(self, *examples: Example) -> list[Tensor]:
        """Hidden states [length, width] of what each example writes, alone."""
        return [self.model(self.batch(example))[0] for example in examples]


def config(name: str, size: int) -> VLMConfig:
    words = Seq2SeqConfig(
        vocab_size=size, width=32, encoder_depth=2, decoder_depth=2, heads=4, head_dim=8, mlp=48, max_length=256
    )
    return VLMConfig(IMAGE, FUSIONS[name], words)


@pytest.fixture(params=FUSIONS)
def beside(request: pytest.FixtureRequest, tokenizer: Tokenizer, build: Callable[[str], Any]) -> Beside:
    """A model whose weights are exact in bfloat16, and so large that all they read counts."""
    model, generator = VLM(config(request.param, tokenizer.vocab_size)).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.4).bfloat16())
    return Beside(model, tokenizer, build("causal").pictures)


@torch.no_grad()
def test_pictures_and_questions_reach_what_is_written(beside: Beside) -> None:
    (found,) = beside.alone(beside.question(1, "how many?", "two"))
    for other in (beside.question(1, "how many?", "two", seed=7), beside.question(1, "where many?", "two")):
        (changed,) = beside.alone(other)
        assert bool(((found - changed).abs().amax(1) > 1e-3).all())


@pytest.mark.parametrize("images", [0, 1, 2])
@torch.no_grad()
def test_cached_is_whole(beside: Beside, images: int) -> None:
    example = beside.question(images, "how many?", "two where two")
    (whole,) = beside.alone(example)
    batch, stop = beside.batch(example), example.length
    for stops in (list(range(1, stop + 1)), [1, stop], [2, stop]):
        cache, out = beside.model.new_cache(), []
        for a, b in pairwise([0, *stops]):
            source = batch.source if a == 0 else None
            out.append(beside.model(Batch(batch.ids[:, a:b], batch.layout.span(a, b), NO_SLOTS, source=source), cache))
        torch.testing.assert_close(torch.cat(out, dim=1)[0], whole, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_batched_is_single_padded_on_either_side(beside: Beside, side: str) -> None:
    examples = beside.mixed()
    batch = beside.batch(*examples, side=side)
    assert batch.source is not None
    assert all(bool((layout.document < 0).any()) for layout in (batch.layout, batch.source.layout))
    hidden = beside.model(batch)
    for row, alone in enumerate(beside.alone(*examples)):
        torch.testing.assert_close(hidden[row][batch.layout.document[row] >= 0], alone, **CLOSE)


@torch.no_grad()
def test_packed_is_separate(beside: Beside) -> None:
    examples = beside.mixed()
    batch = pack(examples, 8, 0, max(e.read.length for e in examples) + 12)
    assert batch.source is not None and len(batch.ids) == len(batch.source.ids) < len(examples)
    assert batch.ids.shape == batch.source.ids.shape
    hidden, found = beside.model(batch), []
    for row in range(len(batch.ids)):
        for document in range(int(batch.layout.document[row].max()) + 1):
            found.append(hidden[row][batch.layout.document[row] == document])
    for wanted in beside.alone(*examples):
        near = [x for x in found if x.shape == wanted.shape and torch.allclose(x, wanted, **CLOSE)]
        assert len(near) == 1


@torch.no_grad()
def test_no_token_that_is_to_be_predicted_is_seen(beside: Beside) -> None:
    example = beside.question(1, "how many?", "two where two")
    (hidden,) = beside.alone(example)
    learned = (example.labels != IGNORE).nonzero()[:, 0].tolist()
    assert learned == list(range(example.length - 1)) and len(learned) > 3
    for t in learned:
        batch = beside.batch(example)
        batch.ids[0, t + 1 :] = 0
        torch.testing.assert_close(beside.model(batch)[0, t], hidden[t], **CLOSE)


def test_what_is_learned_and_where_from(beside: Beside) -> None:
    """The next token of what is written; padded, packed or one by one it teaches the same, down to the pixels."""
    examples, objective = beside.mixed(), NextToken()

    def gradients(batches: list[Batch]) -> tuple[float, list[Tensor]]:
        beside.model.zero_grad()
        losses = [objective(beside.model, batch)["next-token"] for batch in batches]
        torch.stack([total for total, _ in losses]).sum().backward()
        assert sum(count for _, count in losses) == sum(int((e.labels != IGNORE).sum()) for e in examples)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in beside.model.parameters()]
        return float(sum(total.detach() for total, _ in losses)), grads

    loss, wanted = gradients([beside.batch(e) for e in examples])
    by_hand = [
        F.cross_entropy(beside.model.logits(hidden), e.labels, ignore_index=IGNORE, reduction="sum")
        for hidden, e in zip(beside.alone(*examples), examples, strict=True)
    ]
    assert loss == pytest.approx(float(torch.stack(by_hand).sum().detach()), rel=1e-5)
    for batch in (beside.batch(*examples), beside.batch(*examples, side="left"), pack(examples, 8, 0, 64)):
        again, found = gradients([batch])
        assert again == pytest.approx(loss, rel=1e-5)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_gradients_reach_the_pixels_and_every_parameter(beside: Beside) -> None:
    batch = beside.batch(beside.question(1, "how many?", "two"))
    assert batch.source is not None and batch.source.patches is not None
    batch.source.patches.values.requires_grad_()
    beside.model(batch).square().sum().backward()
    grad = batch.source.patches.values.grad
    assert grad is not None and bool((grad.abs().amax(1) > 1e-8).all())
    silent = [name for name, p in beside.model.named_parameters() if p.grad is None]
    assert silent == ["decoder.head.weight"]


def test_without_a_picture_no_weight_of_seeing_is_touched(beside: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an encoder was asked about no picture")

    for part in (beside.model.encoder, beside.model.fusion):
        monkeypatch.setattr(part, "forward", refuse)
    (reply,) = Engine(beside.model, beside.processor).answer([ask("how many?")], SHORT)
    assert reply.error is None and reply.usage["image_tokens"] == 0 and len(reply.ids) > 0
    beside.model(beside.batch(beside.question(0, "how many?", "two"))).sum().backward()
    assert all(p.grad is None for part in (beside.model.encoder, beside.model.fusion) for p in part.parameters())


def test_answers_together_are_answers_one_by_one(beside: Beside) -> None:
    """Also of several questions about one picture, drawn with a temperature as well as greedily."""
    engine = Engine(beside.model, beside.processor)
    first, second = beside.pictures(1), beside.pictures(2, 4)
    talks = [ask("how many?", *first), ask("where?", *first), ask("how?", *second), ask("two?"), ask("how?", *first)]
    for sampling in (SHORT, Sampling(max_new_tokens=5, temperature=1.0, seed=3)):
        for talk, reply in zip(talks, engine.answer(talks, sampling), strict=True):
            (alone,) = engine.answer([talk], sampling)
            assert reply.error is None and reply.ids == alone.ids
            assert reply.confidence == pytest.approx(alone.confidence, abs=1e-5)


def test_what_is_streamed_is_what_is_answered(beside: Beside) -> None:
    engine, talk = Engine(beside.model, beside.processor), ask("how many?", *beside.pictures(1))
    *pieces, last = engine.stream(talk, SHORT)
    (reply,) = engine.answer([talk], SHORT)
    assert last.ids == reply.ids and "".join(pieces) == reply.grounded.text  # type: ignore[union-attr]


def test_saved_and_loaded_it_answers_the_same(beside: Beside, tmp_path: Path) -> None:
    own.save(beside.model, beside.tokenizer, SETTINGS, tmp_path / "saved")
    published, processor = own.load(tmp_path / "saved")
    assert published.model.config == beside.model.config
    wanted, found = beside.model.state_dict(), published.model.state_dict()
    assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)
    talks = [ask("how many?", *beside.pictures(1)), ask("where?")]
    runner: Any = published.runner
    again = Engine(runner, processor).answer(talks, SHORT)
    assert [r.ids for r in again] == [r.ids for r in Engine(beside.model, beside.processor).answer(talks, SHORT)]


@torch.no_grad()
def test_prepared_for_inference_it_writes_the_same(beside: Beside) -> None:
    batch = beside.batch(*beside.mixed())
    real = batch.layout.document >= 0
    wanted, twin = beside.model(batch), prepared(beside.model)
    torch.testing.assert_close(twin(batch)[real], wanted[real], atol=1e-4, rtol=1e-3)
    rough = prepared(beside.model, "bf16")(batch)[real].float()
    assert float((rough - wanted[real]).norm() / wanted[real].norm()) < 0.1
    assert bool(torch.isfinite(prepared(beside.model, "int8")(batch)[real]).all())


@torch.inference_mode()
def test_the_low_level_door_writes_as_the_engine_does(beside: Beside, tmp_path: Path) -> None:
    if beside.model.config.instruction_length:
        return  # its published inputs are those of InstructBLIP, which tests/parity holds
    pad, end = (beside.tokenizer.control(name) for name in ("<pad>", "<eos>"))
    image = beside.processor.image_id
    door = Published(beside.model, {"image_token_id": image, "eos_token_id": end}, "sightline", tmp_path)
    example = beside.question(1, "how many?")
    pixels = torch.stack(example.read.pixels)
    ids = torch.where(example.read.medium == 1, image, example.read.ids)[None]
    written = door.generate_ids(5, input_ids=ids, pixel_values=pixels)[0].tolist()
    (reply,) = Engine(beside.model, beside.processor).answer([ask("how many?", *beside.pictures(1))], SHORT)
    assert written[: len(reply.ids)] == list(reply.ids)
    start = torch.full((1, 1), beside.model.config.decoder.start_id)
    scores = door.logits(input_ids=ids, pixel_values=pixels, decoder_input_ids=start)
    assert int(scores[0, -1].argmax()) == written[0] and pad == 0


def test_many_questions_are_not_learned_side_by_side(beside: Beside) -> None:
    one = ask("how many?", *beside.pictures(1), answer="two")
    assert torch.equal(beside.processor.branches(one).ids, beside.processor(one).ids)
    with pytest.raises(InputError, match="learns one question at a time"):
        beside.processor.branches((*one, *ask("where?", answer="two")))


def test_it_is_described(beside: Beside) -> None:
    model, cfg = beside.model, beside.model.config
    told = describe("tiny", cfg)
    assert sum(told.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert told.visual_tokens == model.num_tokens((1, 4, 4))
    notes = {station.name: (station.shape, station.note) for station in told.pipeline}
    length = told.visual_tokens + QUESTION
    assert notes["sequence"][0] == (length, 32) and "2 blocks of their own" in notes["sequence"][1]
    assert notes["decoder"][0] == (1, 32)
    assert told.cache == 2 * 2 * 32 * 2
    assert told.flops[f"to read {length} tokens"] > 2 * told.flops["to write a token"] > 0


def test_settings_survive_as_plain_values_and_are_held_together(tokenizer: Tokenizer) -> None:
    cfg = config("projected", 300)
    assert from_dict(VLMConfig, to_dict(cfg)) == cfg
    plain = replace(cfg, decoder=DecoderConfig(vocab_size=30, width=32, depth=1, heads=2, mlp=8))
    assert from_dict(VLMConfig, to_dict(plain)) == plain and "kind" not in to_dict(plain)["decoder"]
    assert (cfg.start, plain.start) == (0, None)
    with pytest.raises(ConfigError, match="'cross-attention' lives in a decoder, not in an encoder-decoder"):
        replace(cfg, fusion=CrossAttentionConfig(inputs=24, width=32, heads=2, mlp=8))
    with pytest.raises(ConfigError, match="look is 'prefix', but an encoder-decoder sees all"):
        replace(cfg, look="prefix")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "seq2sec"}, r"unknown decoder\.kind 'seq2sec'; did you mean 'seq2seq'\?"),
        ({"encoder_deep": 2}, r"unknown key 'decoder\.encoder_deep'; did you mean 'encoder_depth'\?"),
        ({"heads": "some"}, r"decoder\.heads = 'some'"),
        ({"heads": None}, r"decoder\.heads = None"),
    ],
)
def test_wrong_settings_are_one_clear_line(change: dict[str, Any], said: str) -> None:
    data = to_dict(config("projected", 300))
    data["decoder"] |= change
    with pytest.raises(ConfigError, match=said):
        from_dict(VLMConfig, data)


def test_without_a_kind_it_is_a_decoder() -> None:
    data = to_dict(config("projected", 300))
    data["decoder"] = {"vocab_size": 30, "width": 32, "depth": 1, "heads": 2, "mpl": 8}
    with pytest.raises(ConfigError, match=r"unknown key 'decoder\.mpl'; did you mean 'mlp'\?"):
        from_dict(VLMConfig, data)
    del data["decoder"]["mpl"]
    with pytest.raises(ConfigError, match=r"key 'decoder\.mlp' is missing"):
        from_dict(VLMConfig, data)
