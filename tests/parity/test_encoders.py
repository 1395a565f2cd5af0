"""Encoders of several families, joined layers, kept class tokens and Whisper against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from published_folders import IMAGE_TOKEN, VISION, layout_1, llava, original_internvit, pixels, randomised, saved, write
from transformers.models.idefics.vision import IdeficsVisionTransformer

from sightline.core.patches import patchify
from sightline.encoders.audio import AudioEncoder, log_mel, sinusoids
from sightline.encoders.vit import ViT
from sightline.zoo import backbones, encoder_names
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


@pytest.mark.parametrize("size", INTERN)
def test_internvit_of_the_original_layout(tmp_path: Path, size: str) -> None:
    theirs, more = intern(size), INTERN[size]
    named = {"qkv_bias": more["attention_bias"], "qk_normalization": more["use_qk_norm"]}
    config = {"model_type": "intern_vit_6b", **VISION, "norm_type": more["norm_type"], **named}
    published = original_internvit(theirs.state_dict())
    ours = load_published(write(tmp_path / "theirs", config, published))
    images = pixels(2)
    with torch.no_grad():
        wanted = theirs(images).last_hidden_state[:, 1:]
    torch.testing.assert_close(ours.features(images), wanted, **TOLERANCE)
    again = encoder_names.intern_vit_keys(ours.model.config).save(ours.model.state_dict())  # type: ignore[arg-type]
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
    ours.load_state_dict(encoder_names.clip_keys(ours.config).load(theirs.state_dict()))
    images = pixels(2)
    with torch.no_grad():
        wanted = theirs(images).last_hidden_state
        found = ours(patchify(images, 7))
    assert found.grids == ((1, 1, 17),) * 2
    torch.testing.assert_close(found.dense(), wanted, **TOLERANCE)


def test_llama_4() -> None:
    """What its adapter is given; no bare folder holds the encoder without it."""
    config = hf.Llama4VisionConfig(
        **VISION, projector_input_dim=32, projector_output_dim=32, vision_output_dim=32, pixel_shuffle_ratio=0.5
    )
    config.intermediate_size = VISION["hidden_size"] * 4  # which the adapter takes for the width of four patches
    theirs = randomised(hf.Llama4VisionModel(config))
    ours = ViT(backbones.llama4_vision_config(config.to_dict())).eval()
    keys = encoder_names.llama4_vision_keys(ours.config)
    published = {k: v for k, v in theirs.state_dict().items() if not k.startswith("vision_adapter.")}
    ours.load_state_dict(keys.load(published))
    seen: list[torch.Tensor] = []
    theirs.layernorm_post.register_forward_hook(lambda module, given, out: seen.append(out[:, :-1]))
    images = pixels(2)
    with torch.no_grad():
        theirs(images)
        torch.testing.assert_close(ours(patchify(images, 7)).dense(), seen[0], **TOLERANCE)
    assert all(torch.equal(value, published[key]) for key, value in keys.save(ours.state_dict()).items())


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


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("seconds", [0.4, 30.0, 31.0])
def test_spectrograms_are_whisper_s(bins: int, seconds: float) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)
    sound[len(sound) // 2 :] *= 1e-3  # quieter by more than the floor allows
    wanted = hf.WhisperFeatureExtractor(feature_size=bins)(sound, sampling_rate=16_000, return_tensors="pt")
    found = log_mel(torch.from_numpy(sound)[None], bins)
    torch.testing.assert_close(found, wanted.input_features, **TOLERANCE)


def test_whisper() -> None:
    sizes = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    few = {"vocab_size": 99, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(**sizes, **few, **ends, num_mel_bins=20, max_source_positions=25)
    theirs = randomised(hf.WhisperModel(config)).encoder
    ours = AudioEncoder(backbones.whisper_config(config.to_dict())).eval()
    keys, published = encoder_names.whisper_keys(ours.config), theirs.state_dict()
    ours.load_state_dict(keys.load(published))
    mels = torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = theirs(mels).last_hidden_state
        torch.testing.assert_close(ours(mels).dense(), wanted, **TOLERANCE)
    assert set(keys.save(ours.state_dict())) == set(published)


def test_whisper_s_positions_are_sinusoids() -> None:
    theirs = hf.WhisperModel(hf.WhisperConfig(encoder_layers=1, decoder_layers=1, d_model=36, max_source_positions=30))
    torch.testing.assert_close(sinusoids(30, 36), theirs.encoder.embed_positions.weight.detach(), **TOLERANCE)
