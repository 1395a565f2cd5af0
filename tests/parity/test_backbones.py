"""Bare encoders and decoders against transformers, through our key maps, from published folders."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from published_folders import TEXT, VISION, layout_1, pixels, randomised, saved, write

from sightline.zoo.published import load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@pytest.mark.parametrize("size", [28, 42])
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_clip(tmp_path: Path, size: int, prefix: str) -> None:
    config = hf.CLIPVisionConfig(**VISION)
    theirs = randomised(hf.CLIPVisionModel(config))
    names = {prefix + k.removeprefix("vision_model."): v for k, v in theirs.state_dict().items()}
    ours = load_published(write(tmp_path, config.to_dict(), names))
    images = pixels(2, size)
    with torch.no_grad():
        wanted = theirs(images, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    torch.testing.assert_close(ours.features(images), wanted, **TOLERANCE)


@pytest.mark.parametrize("size", [28, 30, 42])  # 30: what does not fill a patch is dropped
def test_siglip(tmp_path: Path, size: int) -> None:
    theirs = randomised(hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)))
    ours = load_published(saved(theirs, tmp_path))
    images = pixels(2, size)
    with torch.no_grad():
        wanted = theirs(images, interpolate_pos_encoding=size == 42).last_hidden_state
    torch.testing.assert_close(ours.features(images), wanted, **TOLERANCE)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [28, 42])
def test_dinov2(tmp_path: Path, gated: bool, registers: int, size: int) -> None:
    settings = {**VISION, "mlp_ratio": 2, "use_swiglu_ffn": gated}
    settings.pop("intermediate_size")
    if registers:
        theirs = randomised(
            hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**settings, num_register_tokens=registers))
        )
    else:
        theirs = randomised(hf.Dinov2Model(hf.Dinov2Config(**settings)))
    ours = load_published(saved(theirs, tmp_path))
    images = pixels(2, size)
    with torch.no_grad():
        wanted = theirs(images).last_hidden_state[:, 1 + registers :]
    torch.testing.assert_close(ours.features(images), wanted, **TOLERANCE)


DECODERS = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {"rms_norm_eps": 1e-5}),
    "llama-biased": (hf.LlamaConfig, hf.LlamaForCausalLM, {"attention_bias": True, "rope_theta": 5e5}),
    "llama-tied": (hf.LlamaConfig, hf.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM, {"head_dim": 16, "num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(tmp_path: Path, name: str) -> None:
    config, model, more = DECODERS[name]
    theirs = randomised(model(config(**{**TEXT, **more})))
    ours = load_published(saved(theirs, tmp_path))
    ids = torch.randint(3, 98, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
        greedy = theirs.generate(input_ids=ids, max_new_tokens=32, do_sample=False)[:, 20:]
    torch.testing.assert_close(ours.logits(input_ids=ids), wanted, **TOLERANCE)
    assert torch.equal(ours.generate_ids(input_ids=ids, max_new_tokens=32), greedy)


def test_decoder_with_left_padding(tmp_path: Path) -> None:
    theirs = randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)))
    ours = load_published(saved(theirs, tmp_path))
    ids = torch.randint(3, 98, (2, 20), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[0, :7], mask[0, :7] = 0, 0
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask).logits
        greedy = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32, do_sample=False)[:, 20:]
    got = ours.logits(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], **TOLERANCE)
    assert torch.equal(ours.generate_ids(input_ids=ids, attention_mask=mask, max_new_tokens=32), greedy)


@pytest.mark.parametrize("name", DECODERS)
def test_a_saved_decoder_loads_in_transformers(tmp_path: Path, name: str) -> None:
    config, model, more = DECODERS[name]
    theirs = randomised(model(config(**{**TEXT, **more})))
    ours = load_published(saved(theirs, tmp_path / "theirs"))
    ours.save(tmp_path / "ours")
    again = model.from_pretrained(tmp_path / "ours").eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_the_helper_writes_layout_1() -> None:
    from published_folders import llava

    names = layout_1(llava())
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
