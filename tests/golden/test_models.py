"""Whole models against what their public code gave (tests/golden/models), with weights drawn anew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sightline.core.errors import InputError
from sightline.zoo.checkpoint import write
from sightline.zoo.families import FAMILIES
from sightline.zoo.published import Published, load_published

GOLDEN = load_file(Path(__file__).parent / "models" / "models.safetensors")
CLOSE = {"atol": 2e-5, "rtol": 0.0}
MEDIA = 91

CLIP = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
CLIP |= {"image_size": 24, "patch_size": 8}
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 4, "vocab_size": 96, "max_seq_len": 64}
MOSAIC = {"model_type": "mosaic_gpt", "d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 96, "attn_qk_ln": True}
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "rotary_pct": 1.0,
}
NEOX |= {"intermediate_size": 64, "use_parallel_residual": False, "vocab_size": 96}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 96}
LLAMA |= {"intermediate_size": 48, "rms_norm_eps": 1e-6}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {  # the language model, blocks to a cross-attention block, frames
    "open_flamingo.mpt": (MPT, 2, 1),
    "open_flamingo.mosaic_gpt": (MOSAIC, 1, 1),
    "open_flamingo.gpt_neox": (NEOX, 2, 1),
    "otter.mpt": (MPT, 2, 1),
    "otter.llama": (LLAMA, 4, 1),
    "otter.video": (MPT, 4, 3),
}


def settings(name: str) -> dict[str, Any]:
    text, every, frames = CASES[name]
    found = {"model_type": name.split(".")[0], "vision_config": CLIP, "text_config": text, "media_token_id": MEDIA}
    return {**found, "cross_attn_every_n_layers": every, "max_num_frames": frames if frames > 1 else None}


def weights(name: str) -> dict[str, Tensor]:
    """Drawn under their published names."""
    c = settings(name)
    family = FAMILIES[c["model_type"]]
    model = family.build(c, Path())
    named, numbers = family.keys(model.config).save(model.state_dict()), np.random.RandomState(0)  # type: ignore[arg-type]
    return {k: torch.from_numpy(numbers.standard_normal(tuple(named[k].shape))).float() * 0.3 for k in sorted(named)}


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Published]:
    folder = tmp_path_factory.mktemp("model")
    write(folder, weights(request.param), settings(request.param))
    return request.param, load_published(folder)


def given(frames: int = 1) -> dict[str, Tensor]:
    ids = torch.from_numpy(np.random.RandomState(5).randint(3, 88, (2, 14)))
    ids[0, 4] = ids[0, 9] = ids[1, 2] = ids[1, 8] = MEDIA
    seen = np.random.RandomState(7).standard_normal((2, 2, frames, 3, 24, 24))
    return {"lang_x": ids, "vision_x": torch.from_numpy(seen).float(), "attention_mask": torch.ones_like(ids)}


def test_logits_are_the_original_code_s(model: tuple[str, Published]) -> None:
    name, ours = model
    inputs = given(CASES[name][2])
    found = ours.logits(**inputs)
    torch.testing.assert_close(found[:, -6:], GOLDEN[f"{name}.logits"], **CLOSE)
    torch.testing.assert_close(found[:, :3], GOLDEN[f"{name}.early"], **CLOSE)
    inputs["attention_mask"][1, :2] = 0
    torch.testing.assert_close(ours.logits(**inputs)[:, -4:], GOLDEN[f"{name}.padded"], **CLOSE)


def test_greedy_tokens_are_the_original_code_s(model: tuple[str, Published]) -> None:
    name, ours = model
    assert torch.equal(ours.generate_ids(6, **given(CASES[name][2])), GOLDEN[f"{name}.greedy"])


def test_words_before_any_picture_know_nothing_of_one(model: tuple[str, Published]) -> None:
    name, ours = model
    inputs = given(CASES[name][2])
    other = {**inputs, "vision_x": inputs["vision_x"].flip(0, 1)}
    found, changed = ours.logits(**inputs), ours.logits(**other)
    assert torch.equal(found[0, :4], changed[0, :4])
    assert float((found[0, 4:] - changed[0, 4:]).abs().amax(1).min()) > 1e-3


def test_what_is_saved_is_what_was_read(model: tuple[str, Published], tmp_path: Path) -> None:
    name, ours = model
    ours.save(tmp_path)
    saved, wanted = load_file(tmp_path / "model.safetensors"), weights(name)
    assert set(saved) == set(wanted)
    assert all(torch.equal(saved[key], value) for key, value in wanted.items())


def test_pictures_that_only_fill_a_row_up_are_not_computed(model: tuple[str, Published]) -> None:
    name, ours = model
    inputs = given(CASES[name][2])
    inputs["lang_x"][1, 8] = 5
    batch = ours.batch(**inputs)
    assert batch.patches is not None and len(batch.patches.grids) == 3
    filler = inputs["vision_x"].clone()
    filler[1, 1] = 7.0
    assert torch.equal(ours.logits(**inputs), ours.logits(**{**inputs, "vision_x": filler}))


def test_inputs_that_do_not_fit_are_refused(model: tuple[str, Published]) -> None:
    name, ours = model
    inputs = given(CASES[name][2])
    seen = inputs["vision_x"]
    with pytest.raises(InputError, match=r"2 <image> tokens in a row of lang_x for 1 pictures of vision_x"):
        ours.logits(**{**inputs, "vision_x": seen[:, :1]})
    with pytest.raises(InputError, match=r"4 <image> tokens in lang_x, but no vision_x"):
        ours.logits(lang_x=inputs["lang_x"])
    with pytest.raises(InputError, match=r"vision_x: found \[2, 2, 3, 24, 24\], expected \[2, pictures, frames"):
        ours.logits(**{**inputs, "vision_x": seen[:, :, 0]})
    with pytest.raises(InputError, match="lang_x: found none"):
        ours.logits(vision_x=seen)
    with pytest.raises(InputError, match=r"a (otter|open_flamingo) model takes no pixel_values"):
        ours.logits(lang_x=inputs["lang_x"], pixel_values=seen[:, 0, 0])


@pytest.mark.parametrize("name", ["open_flamingo.mpt", "open_flamingo.mosaic_gpt", "open_flamingo.gpt_neox"])
def test_a_checkpoint_of_what_was_trained_beside_those_it_was_trained_on(name: str, tmp_path: Path) -> None:
    """The tower by transformers' names, the language model by its own, with a table of more rows."""
    from sightline.encoders.vit import ViT
    from sightline.zoo.backbones import clip_config
    from sightline.zoo.encoder_names import clip_keys
    from sightline.zoo.flamingo import open_clip_keys

    trained, language, c = {}, {}, settings(name)
    tower = clip_config(CLIP)
    for key, value in weights(name).items():
        if ".decoder_layer." in key:
            language[key.removeprefix("lang_encoder.").replace(".decoder_layer", "")] = value
        elif not key.startswith("vision_encoder."):
            trained[key] = value
            if key.startswith("lang_encoder.") and "gated" not in key:
                language[key.removeprefix("lang_encoder.")] = value
    for key in ("gpt_neox.embed_in.weight", "transformer.wte.weight", "embed_out.weight"):
        if key in language:  # the language model's own has further rows and not yet what was learned
            language[key] = torch.cat((language[key] + float("embed_out" not in key), torch.zeros(9, 32)))
            if key == "embed_out.weight":
                trained.pop(f"lang_encoder.{key}")
    ours = open_clip_keys(tower).load(
        {k.removeprefix("vision_encoder."): v for k, v in weights(name).items() if k.startswith("vision_encoder.")}
    )
    assert set(ours) == set(ViT(tower).state_dict())
    published = clip_keys(tower).under("vision_model.", "").save(ours)
    write(tmp_path / "vision", {**published, "text_model.final_layer_norm.weight": torch.ones(3)}, {})
    write(tmp_path / "language", language, {})
    write(tmp_path, trained, c)
    found = load_published(tmp_path).logits(**given())
    torch.testing.assert_close(found[:, -6:], GOLDEN[f"{name}.logits"], **CLOSE)


def test_names_that_stand_twice_in_a_state_are_read_once(tmp_path: Path) -> None:
    found = weights("open_flamingo.mpt")
    gate = found["lang_encoder.transformer.blocks.1.gated_cross_attn_layer.attn_gate"]
    twice = {k.replace("vision_encoder.", "vision_encoder.visual."): v for k, v in found.items()}
    twice["lang_encoder.gated_cross_attn_layers.1.attn_gate"] = gate.clone()
    write(tmp_path, twice, settings("open_flamingo.mpt"))
    assert load_published(tmp_path).logits(**given()).shape == (2, 14, 96)
