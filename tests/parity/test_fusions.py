"""Fusions against transformers' modules with random weights, through the key maps of their families."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import randomised as drawn
from torch import Tensor, nn
from transformers.models.aria.modeling_aria import AriaProjector
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection
from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector, Llama4VisionPixelShuffleMLP

from sightline.core.patches import Grid, Patches
from sightline.zoo import aria, blip2, internvl, kosmos2, llama4, perceivers
from sightline.zoo.hollow import hollow
from sightline.zoo.keymap import KeyMap

EXACT = {"atol": 1e-5, "rtol": 0.0}
TEXT = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 50}


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """Drawn anew and three times as large, or little of the features would be left behind norms."""
    with torch.no_grad():
        for parameter in drawn(model, seed).parameters():
            parameter.mul_(3)
    return model.eval()


def ours(config: Any, keys: KeyMap, theirs: dict[str, Tensor]) -> Any:
    """Our fusion with their weights, which our names give back as they were."""
    fusion = config.build().eval()
    fusion.load_state_dict(keys.load(theirs))
    again = keys.save(fusion.state_dict())
    assert set(again) == set(theirs) and all(torch.equal(again[key], theirs[key]) for key in theirs)
    return fusion


def features(items: int, count: int, width: int) -> Tensor:
    return torch.randn(items, count, width, generator=torch.Generator().manual_seed(7))


def packed(x: Tensor, grid: Grid) -> Patches:
    return Patches(x.flatten(0, 1), (grid,) * len(x))


def check(fusion: Any, x: Tensor, grid: Grid, wanted: Tensor, *text: Tensor) -> None:
    """The tokens are the ones that are wanted, and other features would give others."""
    torch.testing.assert_close(fusion(packed(x, grid), *text).tokens, wanted.flatten(0, 1), **EXACT)
    other = fusion(packed(x.flip(2), grid), *text).tokens
    assert (other - wanted.flatten(0, 1)).abs().max() > 0.1


@pytest.mark.parametrize("norms", [False, True])
@torch.no_grad()
def test_idefics_perceiver(norms: bool) -> None:
    perceiver = {"resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 6}
    perceiver |= {"use_resampler": True, "qk_layer_norms_perceiver": norms}
    config = hf.IdeficsConfig(perceiver_config=perceiver, vision_config={"embed_dim": 32})
    theirs = randomised(IdeficsPerceiverResampler(config, 32, 2, 4, 6, 5))
    cfg = perceivers.idefics_config(config.to_dict())
    fusion = ours(cfg, perceivers.idefics_keys(cfg), theirs.state_dict())
    x = features(2, 17, 32)
    check(fusion, x, (1, 1, 17), theirs(x))


@torch.no_grad()
def test_kosmos2_pool() -> None:
    text = {"embed_dim": 32, "attention_heads": 4, "layers": 1, "ffn_dim": 32, "vocab_size": 50}
    config = hf.Kosmos2Config(text_config=text, vision_config={"hidden_size": 24}, latent_query_num=6)
    theirs = randomised(Kosmos2ImageToTextProjection(config))
    cfg = kosmos2.pool_config(config.to_dict())
    keys = kosmos2.pool_keys()
    fusion = ours(cfg, keys, {f"image_to_text_projection.{k}": v for k, v in theirs.state_dict().items()})
    x = features(2, 10, 24)
    check(fusion, x, (1, 2, 5), theirs(x)[0])


@torch.no_grad()
def test_aria_projector() -> None:
    vision = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32}
    config = hf.AriaConfig(
        text_config={**TEXT, "model_type": "aria_text"},
        vision_config={**vision, "model_type": "idefics3_vision"},
        projector_patch_to_query_dict={"16": 3, "36": 5},
    )
    theirs = randomised(AriaProjector(config))
    fusion = ours(aria.pool_config(config.to_dict()), aria.pool_keys(), theirs.state_dict())
    for side, count in ((4, 3), (6, 5)):
        x = features(2, side * side, 32)
        assert fusion.num_tokens((1, side, side)) == count
        check(fusion, x, (1, side, side), theirs(x))


VISION = {"vision_config": {"hidden_size": 20}}
QFORMER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
QFORMER |= {"vocab_size": 40, "max_position_embeddings": 16}


def with_queries(theirs: nn.Module) -> tuple[dict[str, Tensor], Tensor, nn.Linear]:
    """Its tensors under the names of the whole model, its queries [1, 5, 32] and the map to the decoder's width."""
    out, queries = randomised(nn.Linear(32, 24)), features(1, 5, 32)
    names = {f"qformer.{key}": value for key, value in theirs.state_dict().items()}
    return (
        names | {f"language_projection.{k}": v for k, v in out.state_dict().items()} | {"query_tokens": queries},
        (queries),
        out,
    )


@pytest.mark.parametrize("every", [1, 2])
@torch.no_grad()
def test_blip2_qformer(every: int) -> None:
    config = hf.Blip2QFormerConfig(**QFORMER, encoder_hidden_size=20, cross_attention_frequency=every)
    theirs = randomised(Blip2QFormerModel(config))
    tensors, queries, out = with_queries(theirs)
    whole = {"model_type": "blip-2", "qformer_config": config.to_dict(), "num_query_tokens": 5, **VISION}
    cfg = blip2.qformer_config(whole, 24)
    fusion = ours(cfg, blip2.qformer_keys(cfg), tensors)
    x = features(2, 17, 20)
    seen = theirs(query_embeds=queries.expand(2, -1, -1), encoder_hidden_states=x).last_hidden_state
    check(fusion, x, (1, 1, 17), out(seen))


@torch.no_grad()
def test_instructblip_qformer_reads_instructions_of_different_lengths() -> None:
    config = hf.InstructBlipQFormerConfig(**QFORMER, encoder_hidden_size=20)
    theirs = randomised(InstructBlipQFormerModel(config))
    tensors, queries, out = with_queries(theirs)
    whole = {
        "model_type": "instructblip",
        "qformer_config": config.to_dict(),
        "num_query_tokens": 5,
        **VISION,
    }
    cfg = blip2.qformer_config(whole, 24)
    fusion = ours(cfg, blip2.qformer_keys(cfg), tensors)
    x, ids = features(2, 17, 20), torch.tensor([[3, 9, 4, 7], [8, 5, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    seen = theirs(
        input_ids=ids,
        attention_mask=torch.cat((torch.ones(2, 5, dtype=torch.int64), real), dim=1),
        query_embeds=queries.expand(2, -1, -1),
        encoder_hidden_states=x,
    ).last_hidden_state[:, :5]
    check(fusion, x, (1, 1, 17), out(seen), ids.masked_fill(real == 0, -1))
    other = fusion(packed(x, (1, 1, 17)), ids).tokens
    assert (other - out(seen).flatten(0, 1)).abs().max() > 0.1  # padding that is read would change the second


DEFAULTS: dict[str, tuple[Any, Callable[[Any], KeyMap], str, Callable[[], nn.Module]]] = {
    "blip2": (
        blip2.qformer_config({}, 2560),
        blip2.qformer_keys,
        "qformer.",
        lambda: Blip2QFormerModel(hf.Blip2QFormerConfig()),
    ),
    "instructblip": (
        blip2.qformer_config({"model_type": "instructblip"}, 4096),
        blip2.qformer_keys,
        "qformer.",
        lambda: InstructBlipQFormerModel(hf.InstructBlipQFormerConfig()),
    ),
    "kosmos2": (
        kosmos2.pool_config({}),
        lambda _: kosmos2.pool_keys(),
        "image_to_text_projection.",
        lambda: Kosmos2ImageToTextProjection(hf.Kosmos2Config()),
    ),
    "aria": (aria.pool_config({}), lambda _: aria.pool_keys(), "", lambda: AriaProjector(hf.AriaConfig())),
    "idefics": (
        perceivers.idefics_config({}),
        perceivers.idefics_keys,
        "",
        lambda: IdeficsPerceiverResampler(hf.IdeficsConfig(), 768, 6, 16, 96, 64),
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_a_configuration_leaves_out_has_the_published_size(name: str) -> None:
    cfg, keys, prefix, theirs = DEFAULTS[name]
    with hollow():
        wanted = {f"{prefix}{key}": value.shape for key, value in theirs().state_dict().items()}
        found = {key: value.shape for key, value in keys(cfg).save(cfg.build().state_dict()).items()}
    assert {key: shape for key, shape in found.items() if key.startswith(prefix)} == wanted


@torch.no_grad()
def test_internvl_projector() -> None:
    vision = {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    config = hf.InternVLConfig(vision_config=vision, text_config={**TEXT, "model_type": "qwen2"})
    theirs = randomised(InternVLModel(config))
    cfg = internvl.projector_config(config.to_dict(), 12, 24)
    fusion = ours(cfg, internvl.projector_keys(), theirs.multi_modal_projector.state_dict())
    x = features(2, 24, 12)
    shuffled = theirs.pixel_shuffle(x.reshape(2, 4, 6, 12), 0.5).flatten(1, 2)
    wanted = theirs.multi_modal_projector(shuffled)
    check(fusion, x, (1, 4, 6), wanted)


@torch.no_grad()
def test_llama4_projector() -> None:
    vision = {"hidden_size": 12, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"projector_input_dim": 20, "projector_output_dim": 20, "vision_output_dim": 20}
    config = hf.Llama4Config(vision_config=vision, text_config=TEXT)
    adapter = randomised(Llama4VisionPixelShuffleMLP(config.vision_config))
    projector = randomised(Llama4MultiModalProjector(config), seed=1)
    tensors = {f"vision_model.vision_adapter.{k}": v for k, v in adapter.state_dict().items()}
    tensors |= {f"multi_modal_projector.{k}": v for k, v in projector.state_dict().items()}
    fusion = ours(llama4.projector_config(config.to_dict()), llama4.projector_keys(), tensors)
    x = features(2, 16, 12)
    check(fusion, x, (1, 4, 4), projector(adapter(x)))
