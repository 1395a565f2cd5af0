"""Ferret (arXiv:2310.07704): LLaVA with one linear layer and a sampler that makes a token of a region of any form.

Its files are the original LLaVA's with another model type. They are published as differences to Vicuna's, which its
`apply_delta` adds.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.geometry import Frame, Mask, Transform
from ..data.batch import Batch
from ..data.template import vicuna_template
from ..grounding.sampler import Regions, SamplerConfig, points_of
from ..model import VLM, VLMConfig
from .configs import Json
from .family import Family, Habits, Row, Stages, llama, stretched_for_encoder
from .inputs import checked, cut, filled, is_image
from .keymap import KeyMap, Reshape, rule
from .llava import original_config, original_keys, original_tensors

# its last space and the one that Vicuna's form writes after any system text
SYSTEM = (
    "A chat between a human and an AI that understands visuals. "
    "In images, [x, y] denotes points: top-left [0, 0], bottom-right [width-1, height-1]. "
    "Increasing x moves right; y moves down. "
    "Bounding box: [x1, y1, x2, y2]. Image size: 1000x1000. "
    "Follow instructions.  "
)


def config(c: Json, folder: Path) -> VLMConfig:
    """Settings from a `config.json`."""
    plain = original_config(c, folder)
    if not c.get("region_geo_sampler", False):
        raise ConfigError("region_geo_sampler is false: a Ferret that takes means of a region, expected its sampler")
    sampler = SamplerConfig(plain.vit.features, plain.decoder.width, pooling=c.get("sampler_pooler_mode", "mean"))
    return replace(plain, regions=sampler)


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    theirs, alone = "model.region_geo_sampler.", Reshape(lambda x: [x[:, :, 0]], lambda xs: xs[0][:, :, None])
    return original_keys(cfg) + KeyMap(
        (
            rule(f"{theirs}diff_projector_list.{{i}}.{{p}}", "sampler.differ.{i}.{p}"),
            rule(f"{theirs}agg_projector_list.{{i}}.net.0.weight", "sampler.gather.{i}.weight", reshape=alone),
            rule(f"{theirs}agg_projector_list.{{i}}.net.0.bias", "sampler.gather.{i}.bias"),
            rule(f"{theirs}agg_projector_list.{{i}}.norm.{{p}}", "sampler.norms.{i}.{p}"),
            rule(f"{theirs}flatten_projector.{{p}}", "sampler.flatten.{p}"),
            rule(f"{theirs}dim_projector.{{p}}", "sampler.project.{p}"),
        )
    )


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    images: Tensor | None = None,
    region_masks: list[list[Tensor]] | None = None,
    attention_mask: Tensor | None = None,
) -> Batch:
    """Ids with -200 for every token of a picture, and pictures [n, 3, height, width].

    region_masks: of each picture its regions in order, [width, height], not 0 where a region is.
    """
    ids = checked(input_ids, attention_mask=attention_mask)
    patches = None if images is None else cut(model, images)
    batch = filled(model, ids, is_image(c, ids), patches, attention_mask)
    masks = [(item, mask) for item, row in enumerate(region_masks or ()) for mask in row]
    slots = (ids == int(c["im_region_fea_token"])).flatten().nonzero()[:, 0]
    if len(slots) != len(masks) or (masks and (patches is None or masks[-1][0] >= len(patches.grids))):
        raise InputError(f"{len(slots)} <region_fea> in input_ids for {len(masks)} region_masks of as many pictures")
    if not masks:
        return batch
    assert model.config.regions is not None
    count, items = model.config.regions.points, torch.tensor([item for item, _ in masks])
    points = torch.stack([_points(mask, count) for _, mask in masks])
    return replace(batch, regions=Regions(slots, items, points))


def _points(mask: Tensor, count: int) -> Tensor:
    """Points of a published mask [width, height]."""
    width, height = mask.shape
    frame = Frame(width, height)
    return points_of(Mask(np.ascontiguousarray((mask != 0).T.numpy()), frame), Transform(frame), count)


# the original has no image token of its own; the unknown token stands in its slots, which the model replaces
HABITS = Habits(vicuna_template(SYSTEM), "<unk>", "ferret", pixels=stretched_for_encoder)
FAMILIES = {
    "ferret": Family(lambda c, f: VLM(config(c, f)), keys, original_tensors, inputs=inputs, habits=HABITS),
}

STAGES: Stages = {"instruct": ("fusion.*", "sampler.*", "decoder.*")}  # from LLaVA's aligned projector on


def _row(size: str) -> Row:
    v1 = {"vocab_size": 32_001, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2}
    own = {"region_geo_sampler": True, "sampler_pooler_mode": "max", "im_region_fea_token": 32_000}
    return Row(
        name=f"ferret-{size}",
        family="Ferret",
        encoder="CLIP ViT-L/14 336",
        fusion="linear, sampler of regions",
        llm=f"Vicuna {size.upper()} v1.3",
        licence="LLaMA, CC-BY-NC",
        source=f"apple/ml-ferret ferret-{size}-delta, added to Vicuna {size.upper()} v1.3",
        read=lambda c: config(c, Path()),
        config=llama(size, **v1, **tower, **own),
        stages=STAGES,
        proof="logits and greedy tokens equal golden values of the published code on random weights",
    )


ROWS = (_row("7b"), _row("13b"))
