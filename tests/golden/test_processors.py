"""Whole processors of families whose published class needs torchvision, on pictures of fifty sizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import sightline
from sightline.core.patches import patchify, patchify_film
from sightline.core.sequence import Image, ask
from sightline.data.processor import Processor
from sightline.language.tokenizer import Tokenizer
from sightline.zoo import fuyu, qwen2_vl
from sightline.zoo.checkpoint import write
from sightline.zoo.families import FAMILIES

FOLDER = Path(__file__).parent / "processors"
WHOLE = json.loads((FOLDER / "whole.json").read_text())
SIZES = json.loads((FOLDER / "sizes.json").read_text())
QUESTION = "how many red circles are there?"
LEVEL = 1 / 255
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SQUARE = {"image_size": 28, "patch_size": 7}
QWEN: dict[str, Any] = {
    **TEXT,
    "num_key_value_heads": 2,
    "vision_config": {"depth": 1, "num_heads": 2, "patch_size": 7},
}
QWEN["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
# a configuration, the token of pictures, a preprocessor_config.json, how far bytes scaled as published may be apart
FAMILY: dict[str, tuple[dict[str, Any], str, dict[str, Any], float]] = {
    "llama4": (
        {
            "vision_config": {**SQUARE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
            | {
                "intermediate_size": 128,
                "projector_input_dim": 20,
                "projector_output_dim": 20,
                "vision_output_dim": 20,
            },
            "text_config": {**TEXT, "head_dim": 8, "intermediate_size_mlp": 40, "num_local_experts": 3}
            | {"num_key_value_heads": 2},
        },
        "<|patch|>",
        {"size": {"height": 28, "width": 28}},
        4 * LEVEL,  # a level of bytes, and the published scaling in bfloat16
    ),
    "qwen2_vl": (
        {**QWEN, "vision_config": {**QWEN["vision_config"], "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}},
        "<|image_pad|>",
        {"min_pixels": 28 * 28, "max_pixels": 112 * 84, "patch_size": 7},
        LEVEL / 0.26,
    ),
    "qwen2_5_vl": (
        {
            **QWEN,
            "vision_config": {**QWEN["vision_config"], "hidden_size": 32, "out_hidden_size": 32}
            | {"window_size": 28, "fullatt_block_indexes": [0]},
        },
        "<|image_pad|>",
        {"min_pixels": 28 * 28, "max_pixels": 112 * 84, "patch_size": 7},
        LEVEL / 0.26,
    ),
    "internvl": (
        {"vision_config": {**TEXT, **SQUARE}, "text_config": {**TEXT, "model_type": "qwen2", "num_key_value_heads": 2}},
        "<IMG_CONTEXT>",
        {"size": {"height": 28, "width": 28}, "min_patches": 1, "max_patches": 12},
        LEVEL / 0.22,
    ),
    "fuyu": (
        {"text_config": {**TEXT, "model_type": "persimmon"}},
        "|SPEAKER|",
        {"size": {"height": 90, "width": 60}, "patch_size": {"height": 30, "width": 30}},
        2 * LEVEL + 1e-5,
    ),
}


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Processor]:
    """Of random folders in the published layouts that share a tokenizer."""
    tokenizer, out = Tokenizer.from_folder(FOLDER), {}
    for name, (config, image, file, _) in FAMILY.items():
        folder = tmp_path_factory.mktemp("whole") / name
        c = {"model_type": name, "max_position_embeddings": 4096, **config, "vocab_size": tokenizer.words}
        c |= {"image_token_index": tokenizer.control(image), "image_token_id": tokenizer.control(image)}
        if "text_config" in c:
            c["text_config"] = {**c["text_config"], "vocab_size": tokenizer.words, "max_position_embeddings": 4096}
        model = FAMILIES[name].build(c, folder)
        write(folder, FAMILIES[name].keys(model.config).save(model.state_dict()), c)  # type: ignore[arg-type]
        tokenizer.save(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(file))
        out[name] = sightline.load(folder).engine.processor
    return out


def picture(number: int) -> Image:
    """Noise over a slope, as it was drawn for the published processors."""
    width, height = SIZES[number]
    noise = np.random.RandomState(number).randint(0, 76, (height, width, 3))
    values = np.linspace(0, 180, width)[None, :, None] + noise
    return Image(PIL.Image.fromarray(values.astype(np.uint8)))


def published(name: str, pixels: tuple[Tensor, ...]) -> tuple[Tensor, list[list[int]] | None]:
    """Views in the order and layout of the published `pixel_values`, and the grids beside them if any."""
    if name.startswith("qwen"):
        parts, grids = [], []
        for film in pixels:
            patches = patchify_film(film, 7)
            places = torch.arange(float(len(patches.values)))[:, None]
            order = qwen2_vl.row_major(places, patches.grids[0], 2)[:, 0].long()
            parts.append(torch.empty_like(patches.values).index_copy(0, order, patches.values))
            grids.append(list(patches.grids[0]))
        return torch.cat(parts), grids
    if name == "fuyu":
        cut = patchify(pixels[0][None], 30).values
        back = fuyu.channels_first(torch.arange(float(cut.shape[1]))[None], 3, 30)[0].long()
        return torch.empty_like(cut).index_copy(1, back, cut), None
    return torch.stack(pixels), None


def long(ids: list[Any]) -> list[int]:
    """Ids of which repeated ones are written with their number."""
    return [x for each in ids for x in ([each[0]] * each[1] if isinstance(each, list) else [each])]


@pytest.mark.parametrize("name", FAMILY)
def test_ids_and_pixels_of_fifty_sizes(processors: dict[str, Processor], name: str) -> None:
    ours, level, shapes = processors[name], FAMILY[name][3], set()
    assert len(WHOLE[name]) >= 50 == len(SIZES)
    for row in WHOLE[name]:
        example = ours(ask(QUESTION + "\n" * (name == "fuyu"), *map(picture, row["pictures"])))
        assert example.ids.tolist() == long(row["ids"]), row["pictures"]
        values, grids = published(name, example.pixels)
        assert list(values.shape) == row["shape"] and grids == row.get("grids")
        shapes.add(tuple(row["shape"]))
        where = np.random.RandomState(1000 + row["pictures"][0]).randint(0, values.numel(), 16)
        found = values.flatten()[torch.from_numpy(where)]
        torch.testing.assert_close(found, torch.tensor(row["pixels"]), atol=level, rtol=0.0)
    assert len(shapes) > 3
