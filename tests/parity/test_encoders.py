"""Encoders of InternVL, BLIP-2, Kosmos-2, IDEFICS, several layers, kept class tokens, against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import IMAGE_TOKEN, VISION, layout_1, llava, pixels, randomised, saved, write
from transformers.models.idefics.vision import IdeficsVisionTransformer

from sightline.core.patches import patchify
from sightline.encoders.vit import ViT
from sightline.zoo import backbones
from sightline.zoo.published import load_published

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}

INTERN = {
    "6b": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
    "300m": {"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True},
}


def intern(size: str) -> Any:
    return randomised(hf.InternVLVisionModel(hf.InternVLVisionConfig(**VISION, **INTERN[size])))


@pytest.mark.parametrize("size", INTERN)
@pytest.mark.parametrize("side", [28, 42])
def test_internvit(tmp_path: Path, size: str, side: int) -> None:
    theirs = intern(size)
    ours = load_published(saved(theirs, tmp_path))
    images = pixels(2, side)
    with torch.no_grad():
        wanted = theirs(images).last_hidden_state[:, 1:]
    torch.testing.assert_close(ours.features(images), wanted, **TOLERANCE)


def original_internvit(theirs: Any) -> dict[str, torch.Tensor]:
    """The same tensors by the names of OpenGVLab/InternVL."""
    tensors, out = theirs.state_dict(), {}
    renamed = {
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "patch_embeddings.projection": "patch_embedding",
        "encoder.layer.": "encoder.layers.",
        "attention.projection_layer": "attn.proj",
        "attention.": "attn.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_": "ls",
    }
    for key, value in tensors.items():
        if "_proj." in key:
            if ".q_proj." not in key:
                continue
            value = torch.cat([tensors[key.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            key = key.replace("q_proj", "qkv")
        for old, new in renamed.items():
            key = key.replace(old, new)
        out[key] = value
    return out


@pytest.mark.parametrize("size", INTERN)
def test_internvit_of_the_original_layout(tmp_path: Path, size: str) -> None:
    theirs, more = intern(size), INTERN[size]
    named = {"qkv_bias": more["attention_bias"], "qk_normalization": more["use_qk_norm"]}
    config = {"model_type": "intern_vit_6b", **VISION, "norm_type": more["norm_type"], **named}
    published = original_internvit(theirs)
    ours = load_published(write(tmp_path / "theirs", config, published))
    images = pixels(2)
    with torch.no_grad():
        wanted = theirs(images).last_hidden_state[:, 1:]
    torch.testing.assert_close(ours.features(images), wanted, **TOLERANCE)
    again = backbones.intern_vit_keys(ours.model.config).save(ours.model.state_dict())  # type: ignore[arg-type]
    assert set(again) == set(published)
    assert all(torch.equal(again[key], published[key]) for key in published)


@pytest.mark.parametrize("family", ["blip_2", "instructblip"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", [28, 42])
def test_eva_clip(tmp_path: Path, family: str, bias: bool, side: int) -> None:
    config, model = {
        "blip_2": (hf.Blip2VisionConfig, hf.Blip2VisionModel),
        "instructblip": (hf.InstructBlipVisionConfig, hf.InstructBlipVisionModel),
    }[family]
    theirs = randomised(model(config(**VISION, qkv_bias=bias)))
    ours = load_published(saved(theirs, tmp_path))
    images = pixels(2, side)
    with torch.no_grad():
        wanted = theirs(images, interpolate_pos_encoding=side != 28).last_hidden_state
    assert wanted.shape[1] == (side // 7) ** 2 + 1  # the class token is among them
    torch.testing.assert_close(ours.features(images), wanted, **TOLERANCE)


def test_a_saved_eva_clip_loads_in_transformers(tmp_path: Path) -> None:
    theirs = randomised(hf.Blip2VisionModel(hf.Blip2VisionConfig(**VISION)))
    load_published(saved(theirs, tmp_path / "theirs")).save(tmp_path / "ours")
    again = hf.Blip2VisionModel.from_pretrained(tmp_path / "ours").eval()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("side", [28, 42])
def test_kosmos_2(tmp_path: Path, side: int) -> None:
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionModel

    theirs = randomised(Kosmos2VisionModel(hf.Kosmos2Config(vision_config=VISION).vision_config))
    ours = load_published(saved(theirs, tmp_path))
    images = pixels(2, side)
    with torch.no_grad():
        last = theirs(images, interpolate_pos_encoding=side != 28).last_hidden_state
        wanted = torch.nn.functional.normalize(theirs.model.post_layernorm(last), dim=-1)
    torch.testing.assert_close(ours.features(images), wanted, **TOLERANCE)


def test_idefics() -> None:
    """No bare folder of it exists: its tower is a plain module."""
    sizes = {**VISION, "embed_dim": VISION["hidden_size"]}
    config = hf.IdeficsConfig(vision_config=sizes).vision_config
    theirs = randomised(IdeficsVisionTransformer(config))
    ours = ViT(backbones.idefics_vision_config(config.to_dict())).eval()
    ours.load_state_dict(backbones.clip_keys(ours.config).load(theirs.state_dict()))
    images = pixels(2)
    with torch.no_grad():
        wanted = theirs(images).last_hidden_state
        found = ours(patchify(images, 7))
    assert found.grids == ((1, 1, 17),) * 2
    torch.testing.assert_close(found.dense(), wanted, **TOLERANCE)


@pytest.mark.parametrize("vision, strategy", [("clip", "default"), ("clip", "full"), ("siglip", "full")])
@pytest.mark.parametrize("layer", [-1, [-1, -3], [-2, -4, -2]])
def test_llava_with_several_layers_and_the_class_token(
    tmp_path: Path, vision: str, strategy: str, layer: int | list[int]
) -> None:
    theirs = llava("llama", vision, vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    config = theirs.config.to_dict()
    ours = load_published(write(tmp_path, config, layout_1(theirs)))
    slots = 17 if (vision, strategy) == ("clip", "full") else 16
    words = torch.arange(3, 12)
    ids = torch.cat([words[:1], torch.full((slots,), IMAGE_TOKEN), words[1:]])[None]
    images = pixels(1)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=images).logits
    torch.testing.assert_close(ours.logits(input_ids=ids, pixel_values=images), wanted, atol=1e-4, rtol=0.0)
