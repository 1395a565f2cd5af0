"""Several conversations in one row teach exactly what each teaches alone, whatever the fusion, in less padding."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from sightline.core.errors import ConfigError
from sightline.core.sequence import Image, Message, Text
from sightline.data.batch import Example, Size, collate, pack, row_length
from sightline.data.images import Square
from sightline.encoders.vit import ViTConfig
from sightline.fusion.cross_attention import CrossAttentionConfig
from sightline.fusion.glu import GLUConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.qformer import QFormerConfig
from sightline.fusion.resampler import ResamplerConfig
from sightline.fusion.visual_expert import VisualExpertConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.tokenizer import Tokenizer
from sightline.layers.rotary import RopeScaling
from sightline.model import VLM, FusionConfig, VLMConfig
from sightline.training.loader import Batches, batches
from sightline.training.objectives import NextToken
from sightline.training.recipe import Recipe
from sightline.training.run import initial_model, objective_of, processor_of
from sightline.training.sources import FilesSource
from sightline.training.trainer import Trainer
from sightline.zoo.own import ProcessorConfig
from sightline.zoo.prepared import prepared

SIZES: Any = {"inputs": 24, "width": 32}
CROSS: Any = {**SIZES, "heads": 4, "mlp": 48, "interval": 2}
FUSIONS: dict[str, FusionConfig] = {
    "projector": ProjectorConfig(**SIZES),
    "qformer": QFormerConfig(**SIZES, queries=3, hidden=16, depth=2, heads=2, mlp=24),
    "cross-attention": CrossAttentionConfig(
        **CROSS, resampler=ResamplerConfig(inputs=24, latents=5, depth=1, heads=2, head_dim=8)
    ),
    "cross-attention to all": CrossAttentionConfig(**CROSS, latest=False),
    "visual expert": VisualExpertConfig(GLUConfig(**SIZES, hidden=40)),
}


def tiny(fusion: str, tokenizer: Tokenizer) -> VLM:
    """A model with weights so large that everything counts, gates as well."""
    config = VLMConfig(
        ViTConfig(image_size=16, patch_size=8, width=24, depth=1, heads=2, mlp=32),
        FUSIONS[fusion],
        DecoderConfig(vocab_size=tokenizer.vocab_size, width=32, depth=2, heads=4, kv_heads=2, mlp=48),
    )
    model, generator = VLM(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def examples(model: VLM, tokenizer: Tokenizer) -> list[Example]:
    """Conversations with none to three pictures, of one or two turns."""
    processor = ProcessorConfig(Square(16), max_length=256).build(tokenizer, model)
    rng, out = np.random.default_rng(0), []
    for pictures, words in [(1, 2), (0, 7), (2, 1), (1, 12), (3, 4), (0, 1)]:
        noise = [rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(pictures)]
        images = [Image(PIL.Image.fromarray(each)) for each in noise]
        said = Message("assistant", (Text(" ".join(["two"] * words)),))
        talk = [Message("user", (*images, Text("how many?"))), said]
        if words > 3:
            talk += [Message("user", (Text("where?"),)), Message("assistant", (Text("red"),))]
        out.append(processor(tuple(talk)))
    return out


@pytest.mark.parametrize("by_answer", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_packed_loss_and_gradients_are_those_of_separate_rows(
    fusion: str, tokenizer: Tokenizer, by_answer: bool
) -> None:
    model = tiny(fusion, tokenizer)
    made, pad, objective = examples(model, tokenizer), tokenizer.control("<pad>"), NextToken(by_answer=by_answer)

    def learned(found: list[Any]) -> tuple[Tensor, int, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        terms = [term for batch in found for term in objective(model, batch).values()]
        total, count = sum(total for total, _ in terms), sum(count for _, count in terms)
        assert isinstance(total, Tensor)
        (total / count).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return total.detach() / count, count, grads

    alone, count, wanted = learned([collate([example], 8, pad) for example in made])
    lengths = [example.length for example in made]
    packed = pack(made, 8, pad, row_length(both(lengths), 2 * max(lengths)))
    assert packed.layout.batch < len(made)
    together, packed_count, found = learned([packed])
    assert packed_count == count
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert set(found) == set(wanted)
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def both(lengths: Sequence[int]) -> list[Size]:
    """Sizes of examples that read nothing beside what they write."""
    return [(length, length) for length in lengths]


def test_rows_are_as_few_as_they_can_be_and_filled_alike() -> None:
    assert row_length(both([5, 3, 3, 2, 2]), 8) == 8
    assert row_length(both([4, 4, 4, 4]), 11) == 8  # two rows, of which none needs more
    assert row_length(both([7]), 100) == 7
    for seed in range(20):
        rng = random.Random(seed)
        lengths = [rng.randint(30, 210) for _ in range(16)]
        length = row_length(both(lengths), 512)
        assert max(lengths) <= length <= 512
        with pytest.raises(ValueError, match="does not fit"):
            row_length(both(lengths), max(lengths) - 1)


# ----------------------------------------------------------------------------------------------------------- in a stage


@pytest.fixture
def mixed(recipe: Recipe, tmp_path: Path) -> Recipe:
    """A stage of 512 conversations about a picture, of 20 to 200 words each."""
    PIL.Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    rng, rows = random.Random(0), []
    for i in range(512):
        turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "one " * rng.randint(20, 200)}]
        rows.append({"id": i, "image": "red.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = FilesSource(kind="conversations", format="llava", path=str(tmp_path / "rows.json"))
    stage = replace(recipe.stages[-1], data={"mine": 1.0}, steps=16, batch=32)
    return replace(recipe, sources={"mine": source}, stages=(stage,))


def staged(recipe: Recipe, tokenizer: Tokenizer, folder: Path, **changes: Any) -> tuple[Trainer, Batches]:
    chosen = replace(recipe, stages=(replace(recipe.stages[0], **changes),))
    model = initial_model(chosen)
    data = Batches(chosen.stages[0], 0, 0, chosen.sources, processor_of(chosen, tokenizer, model))
    return Trainer(
        chosen, chosen.stages[0], model, objective_of(chosen.stages[0], chosen, tokenizer, model), folder
    ), data


def test_packing_leaves_less_than_a_twentieth_of_padding(mixed: Recipe, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def padding(**changes: Any) -> float:
        _, data = staged(mixed, tokenizer, tmp_path, **changes)
        found = list(batches(data, 0, 0, data.stage.group))
        assert sum(len(batch.extra["names"]) for batch in found) == 512
        return 1 - sum(int((b.layout.document >= 0).sum()) for b in found) / sum(b.ids.numel() for b in found)

    alone, packed, small = padding(), padding(packing=512), padding(packing=512, batch=8, steps=64)
    print(f"padding: {alone:.1%} alone, {packed:.1%} packed, {small:.1%} packed in batches of 8")
    assert alone > 0.3 and packed < 0.05 and small < 0.05


def test_rows_that_hold_no_conversation_are_refused(mixed: Recipe, tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, data = staged(mixed, tokenizer, tmp_path, packing=5)
    with pytest.raises(ConfigError, match=r"packing is 5, but the shortest conversation of a batch has \d+ tokens"):
        data[0]


@pytest.mark.parametrize("changes", [{}, {"group": 2}, {"recompute": True}], ids=str)
def test_a_packed_stage_steps_as_an_unpacked_one(
    mixed: Recipe, tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Also with several micro-batches, which are divided by the tokens of all of them."""
    base: dict[str, Any] = {"batch": 8, "steps": 2, "optimizer": "adamw"}
    plain, whole = staged(mixed, tokenizer, tmp_path, **base)
    halved: dict[str, Any] = {**base, "batch": 4, "accumulate": 2, "packing": 400}
    packed, halves = staged(mixed, tokenizer, tmp_path, **halved, **changes)
    for k in range(2):
        one, other = plain.learn([whole[k]]), packed.learn([halves[2 * k], halves[2 * k + 1]])
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.norm == pytest.approx(other.norm, rel=1e-4)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(packed.model.state_dict()[name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_a_model_that_stretches_with_its_rows_is_not_packed(
    mixed: Recipe, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    scaling = RopeScaling(kind="ntk", factor=2.0, original=64)
    decoder = replace(mixed.model.decoder, rope_scaling=scaling)
    stretching = replace(mixed, model=replace(mixed.model, decoder=decoder))
    with pytest.raises(ConfigError, match="'instruct' packs rows, but its model stretches with a row's length"):
        staged(stretching, tokenizer, tmp_path, packing=400)
    staged(stretching, tokenizer, tmp_path)


# ---------------------------------------------------------------------------------------------------------- recomputing


def held(trainer: Trainer, batch: Any) -> int:
    """Bytes that a forward pass keeps for its gradients, what blocks read included."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def before(block: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        note(inputs[0])

    blocks = (*trainer.model.encoder.blocks, *trainer.model.decoder.blocks)
    hooks = [block.register_forward_pre_hook(before) for block in blocks]
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sum(total for total, _ in trainer.objective(trainer.model, batch).values()).backward()  # type: ignore[union-attr]
    for hook in hooks:
        hook.remove()
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_blocks_give_the_same_gradients_and_hold_less(
    mixed: Recipe, tokenizer: Tokenizer, tmp_path: Path, precision: str
) -> None:
    model = replace(
        mixed.model,
        image=replace(mixed.model.image, depth=3),
        decoder=replace(mixed.model.decoder, depth=4),
    )
    deeper = replace(mixed, model=model)
    settings: dict[str, Any] = {"learn": {"*": 1e-3}, "batch": 4, "precision": precision}
    kept, data = staged(deeper, tokenizer, tmp_path, **settings)
    again, _ = staged(deeper, tokenizer, tmp_path, **settings, recompute=True)
    for k in range(2):
        one, other = kept.learn([data[k]]), again.learn([data[k]])
        assert (one.loss, one.norm) == (other.loss, other.norm)
    first, second = kept.model.state_dict(), again.model.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    batch = data[3]
    with torch.no_grad():  # a twin for inference is made of it as of any other
        assert torch.equal(prepared(again.model)(batch), prepared(kept.model)(batch))
    whole, less = held(kept, data[2]), held(again, data[2])
    print(f"held for gradients: {whole:,} bytes, recomputed {less:,}")
    assert less < 0.55 * whole
