"""Llama 3.2 Vision (arXiv:2407.21783, section 7), in transformers Mllama: tiles, and Llama 3.1 with cross-attention.

Blocks of cross-attention are numbered among the language model's own. A token that sees no picture gets nothing from
them, as in Meta's code; transformers lets its attention, though not its feed-forward, look at all that is there.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.patches import Patches, join
from ..data.batch import Batch
from ..data.images import CLIP_MEAN, CLIP_STD, Scaling
from ..data.processor import ImagePipeline
from ..data.template import headed
from ..data.tiles import Canvas
from ..encoders.vit import TilesConfig, ViTConfig
from ..fusion.cross_attention import CrossAttentionConfig
from ..fusion.projector import ProjectorConfig
from ..model import VLM, VLMConfig
from .configs import Json, act, expect
from .family import EQUAL, Family, Habits, Row, scaling, side_of
from .inputs import checked, cut, filled, is_image
from .keymap import KeyMap, Reshape, flat_patch, rule
from .language_names import decoder_keys
from .languages import language_config

# what the published configuration classes have by default
SHAPES = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
TEXT: dict[str, Any] = {"vocab_size": 128_256, "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32}
TEXT |= {"num_key_value_heads": 8, "intermediate_size": 14_336, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0}
TEXT |= {"max_position_embeddings": 131_072}
READ_ONLY = 8  # rows of the table beyond the vocabulary, for the picture's token and others that are never written


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`."""
    image, text = vision_config(c.get("vision_config") or {}), {**TEXT, **(c.get("text_config") or {})}
    expect(text, tie_word_embeddings=False)
    crossing = text.get("cross_attention_layers") or [3, 8, 13, 18, 23, 28, 33, 38]
    depth = text["num_hidden_layers"] - len(crossing)
    plain = language_config({**text, "model_type": "llama", "num_hidden_layers": depth})
    decoder = replace(plain, extra_vocab=READ_ONLY, extra_written=False)
    places = [number - before for before, number in enumerate(crossing)]
    interval = places[1] - places[0] if len(places) > 1 else max(1, depth - places[0])
    fusion = CrossAttentionConfig(
        inputs=image.features,
        width=decoder.width,
        heads=decoder.heads,
        head_dim=decoder.head_size,
        kv_heads=decoder.kv_heads,
        mlp=decoder.mlp,
        resampler=ProjectorConfig(inputs=image.features, width=decoder.width, layers=1),
        interval=max(1, interval),
        start=places[0],
        adjacent=True,
        blind_mlp=False,
        norm="rms",
        eps=decoder.eps,
        activation=decoder.activation,
        gated_mlp=True,
        qk_norm=True,
    )
    if list(fusion.places(depth)) != places:
        raise ConfigError(f"cross_attention_layers {crossing}, expected them at one distance from each other")
    return VLMConfig(image, fusion, decoder)


def vision_config(c: Json) -> ViTConfig:
    """Its vision tower: the last layer's features, then those of the layers between that are named."""
    depth, between = c.get("num_hidden_layers", 32), c.get("intermediate_layers_indices") or [3, 7, 15, 23, 30]
    shapes = tuple((rows, columns) for rows, columns in c.get("supported_aspect_ratios") or SHAPES)
    tiles = TilesConfig(shapes, c.get("num_global_layers", 8))
    expect(c, max_num_tiles=tiles.most, norm_eps=1e-5)
    return ViTConfig(
        image_size=c.get("image_size", 448),
        patch_size=c.get("patch_size", 14),
        width=c.get("hidden_size", 1280),
        depth=depth,
        heads=c.get("attention_heads", c.get("num_attention_heads", 16)),
        mlp=c.get("intermediate_size", 5120),
        channels=c.get("num_channels", 3),
        activation=act(c.get("hidden_act", "gelu")),
        eps=1e-5,
        qkv_bias=False,
        out_bias=False,
        patch_bias=False,
        class_token=True,
        pre_norm=True,
        layer=(-1, *(number - depth for number in between)),
        keep_prefix=True,
        tiles=tiles,
    )


# ----------------------------------------------------------------------------------------------------------- names


def split_at(rows: int) -> Reshape:
    """A table published as one whose rows from that number on are parameters of their own."""
    return Reshape(there=lambda x: [x[:rows], x[rows:]], back=lambda xs: torch.cat(xs))


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    assert isinstance(cfg.fusion, CrossAttentionConfig)
    places, depth = cfg.fusion.places(cfg.decoder.depth), cfg.decoder.depth
    crossing = [place + before for before, place in enumerate(places)]
    own = [number for number in range(depth + len(crossing)) if number not in crossing]
    words, table = decoder_keys(cfg.decoder), "model.embed_tokens.weight"
    rows = rule(table, "embedding.weight", "extra_embedding.weight", reshape=split_at(cfg.decoder.vocab_size))
    words = KeyMap((*(r for r in words.rules if r.theirs != table), rows), words.ignore)
    return (
        vision_keys(cfg.vit).under("vision_model.", "encoder.")
        + KeyMap((rule("multi_modal_projector.{p}", "fusion.resampler.layers.0.{p}"),))
        + words.numbered({i: i for i in own}).under("language_model.", "decoder.")
        + cross_keys().numbered({i: i for i in crossing}).under("language_model.model.", "decoder.")
    )


def cross_keys() -> KeyMap:
    """Names of its cross-attention blocks, below `language_model.model.`."""
    layer, block = "layers.{i}.", "blocks.{i}."
    return KeyMap(
        (
            *(rule(f"{layer}cross_attn.{x}_proj.{{p}}", f"{block}cross_attention.{x}.{{p}}") for x in "qkvo"),
            *(rule(f"{layer}cross_attn.{x}_norm.{{p}}", f"{block}cross_attention.{x}_norm.{{p}}") for x in "qk"),
            rule(f"{layer}cross_attn_attn_gate", f"{block}cross_gate1"),
            rule(f"{layer}cross_attn_mlp_gate", f"{block}cross_gate2"),
            rule(f"{layer}input_layernorm.{{p}}", f"{block}cross_norm1.{{p}}"),
            rule(f"{layer}post_attention_layernorm.{{p}}", f"{block}cross_norm2.{{p}}"),
            *(
                rule(f"{layer}mlp.{x}_proj.{{p}}", f"{block}cross_feedforward.{x}.{{p}}")
                for x in ("gate", "up", "down")
            ),
        )
    )


def vision_keys(cfg: ViTConfig) -> KeyMap:
    """Names of its vision tower, below `vision_model.`."""
    names = {"mlp.fc1": "feedforward.up", "mlp.fc2": "feedforward.down"}
    names |= {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    names |= {f"self_attn.{x}_proj": f"attention.{x}" for x in "qkvo"}
    tables = {"pre_tile_positional_embedding": "tiles_before", "post_tile_positional_embedding": "tiles_after"}
    gated = "global_transformer.layers.{i}."
    return KeyMap(
        (
            rule("patch_embedding.weight", "patch.weight", reshape=flat_patch(cfg.channels, cfg.patch_size)),
            rule("class_embedding", "class_token"),
            rule("gated_positional_embedding.embedding", "positions"),
            rule("gated_positional_embedding.gate", "tile_positions.gate"),
            rule("gated_positional_embedding.tile_embedding.weight", "tile_positions.table"),
            *(rule(f"{theirs}.embedding.weight", f"{ours}.table") for theirs, ours in tables.items()),
            *(rule(f"{theirs}.gate", f"{ours}.gate") for theirs, ours in tables.items()),
            rule("layernorm_pre.{p}", "pre_norm.{p}"),
            rule("layernorm_post.{p}", "norm.{p}"),
            *(rule(f"transformer.layers.{{i}}.{a}.{{p}}", f"blocks.{{i}}.{b}.{{p}}") for a, b in names.items()),
            *(rule(f"{gated}{a}.{{p}}", f"gated.{{i}}.{b}.{{p}}") for a, b in names.items()),
            rule(f"{gated}gate_attn", "gated.{i}.gate1"),
            rule(f"{gated}gate_ffn", "gated.{i}.gate2"),
        )
    )


# ---------------------------------------------------------------------------------------------- inputs and template


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    aspect_ratio_ids: Tensor | None = None,
    aspect_ratio_mask: Tensor | None = None,
    cross_attention_mask: Tensor | None = None,
) -> Batch:
    """Tiles [batch, pictures, most tiles, 3, height, width] and the number of each picture's shape of canvas, from 1.

    cross_attention_mask: [batch, length, pictures, most tiles]; a picture's tiles are seen all or none. Without one, a
    token looks at the pictures whose tokens came last. aspect_ratio_mask says nothing that the numbers do not.
    """
    ids = checked(input_ids, attention_mask=attention_mask)
    is_slot = is_image(c if "image_token_id" in c else {"image_token_index": 128_256, **c}, ids)
    begun = is_slot.cumsum(1)
    if pixel_values is None:
        if bool(is_slot.any()):
            raise InputError(f"{int(is_slot.sum())} image tokens in input_ids, but no pixel_values")
        return filled(model, ids, is_slot & False, None, attention_mask)
    if pixel_values.dim() != 6 or len(pixel_values) != len(ids):
        found = list(pixel_values.shape)
        raise InputError(f"pixel_values: found {found}, expected [{len(ids)}, pictures, tiles, 3, height, width]")
    shape = [len(ids), pixel_values.shape[1]]
    if aspect_ratio_ids is None or list(aspect_ratio_ids.shape) != shape:
        numbers = "none" if aspect_ratio_ids is None else list(aspect_ratio_ids.shape)
        raise InputError(f"aspect_ratio_ids: found {numbers}, expected {shape}")
    if cross_attention_mask is not None:
        if list(cross_attention_mask.shape[:3]) != [*ids.shape, shape[1]] or cross_attention_mask.dim() != 4:
            wanted = f"[{len(ids)}, {ids.shape[1]}, {shape[1]}, tiles]"
            raise InputError(f"cross_attention_mask is {list(cross_attention_mask.shape)}, expected {wanted}")
        batch = filled(model, ids, is_slot & False, None, attention_mask)
        batch = replace(batch, layout=replace(batch.layout, item=begun))
        return masked(model, batch, pixel_values, aspect_ratio_ids, cross_attention_mask.bool())
    given = aspect_ratio_ids > 0
    if not torch.equal(given.sum(1), begun[:, -1]):
        places = begun[:, -1].tolist()
        raise InputError(f"{given.sum(1).tolist()} pictures in the rows for {places} image tokens in input_ids")
    patches = canvases(model, pixel_values[given], aspect_ratio_ids[given]) if bool(given.any()) else None
    batch = filled(model, ids, is_slot, patches, attention_mask)
    return replace(batch, layout=replace(batch.layout, item=begun))


def masked(model: VLM, batch: Batch, pixel_values: Tensor, numbers: Tensor, mask: Tensor) -> Batch:
    """A batch of words with the pictures that a mask [batch, length, pictures, most tiles] shows to some of them."""
    looks = mask[..., 0]
    row, number = (looks.any(dim=1) & (numbers > 0)).nonzero().unbind(1)  # what only fills a row up is not computed
    if not len(row):
        return batch
    shapes = numbers[row, number]
    tiles = torch.tensor([rows * columns for rows, columns in sizes(model, shapes)])
    real = torch.arange(mask.shape[3]) < tiles[:, None]
    seen = (mask[row, :, number] & real[:, None]).sum(2)  # [pictures, length]
    if not torch.equal(seen, looks[row, :, number] * tiles[:, None]):
        raise InputError("cross_attention_mask shows some tiles of a picture and not others, expected all or none")
    patches = canvases(model, pixel_values[row, number], shapes)
    owners = torch.stack((row, torch.zeros_like(row), number + 1), dim=1)
    return replace(batch, patches=patches, owners=owners, looks=looks)


def sizes(model: VLM, shapes: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of tiles for the numbers of canvases."""
    assert model.config.vit.tiles is not None
    known = model.config.vit.tiles.shapes
    if int(shapes.max()) > len(known):
        raise InputError(f"aspect_ratio_ids up to {int(shapes.max())}, expected at most {len(known)}")
    return [known[number - 1] for number in shapes.tolist()]


def canvases(model: VLM, tiles: Tensor, shapes: Tensor) -> Patches:
    """Pictures as tiles [pictures, most tiles, 3, height, width], each put together to the canvas it was cut from."""
    made = []
    for picture, (rows, columns) in zip(tiles, sizes(model, shapes), strict=True):
        if len(picture) < rows * columns:
            raise InputError(f"{len(picture)} tiles a picture in pixel_values, one of {rows}x{columns} is told")
        laid = picture[: rows * columns].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
        made.append(cut(model, laid.flatten(3, 4).flatten(1, 2)[None]))
    return join(made)


template = headed("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def _canvas(c: Json, side: int) -> ImagePipeline:
    ways = scaling({"resample": 2, **c}, Scaling(CLIP_MEAN, CLIP_STD, "bilinear"))
    return Canvas(side_of(c.get("size", side)), c.get("max_image_tiles", 4), cut=False, scaling=ways)


# ------------------------------------------------------------------------------------------------- families and rows

END = "<|eot_id|>"
HABITS = Habits(template, "<|image|>", bos="<|begin_of_text|>", eos=END, end=END, pixels=_canvas)
FAMILIES = {"mllama": Family(lambda c, f: VLM(config(c)), keys, inputs=inputs, habits=HABITS)}

STAGES = {"pretrain": ("encoder.*", "fusion.*", "decoder.blocks.*.cross_*"), "instruct": ("encoder.*", "fusion.*")}
VISION_560 = {"image_size": 560, "patch_size": 14}
LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_31 |= {"original_max_position_embeddings": 8192}
SIZES: dict[str, dict[str, Any]] = {
    "11b": {},
    "90b": {
        "hidden_size": 8192,
        "num_hidden_layers": 100,
        "num_attention_heads": 64,
        "intermediate_size": 28_672,
        "cross_attention_layers": list(range(3, 100, 5)),
    },
}


def _row(size: str) -> Row:
    return Row(
        name=f"llama-3.2-{size}-vision-instruct",
        family="Llama 3.2 Vision",
        encoder="ViT-H/14 on up to 4 tiles of 560",
        fusion="linear, gated cross-attention before every 4. block",
        llm={"11b": "Llama 3.1 8B", "90b": "Llama 3.1 70B"}[size],
        licence="Llama 3.2",
        source=f"meta-llama/Llama-3.2-{size.upper()}-Vision-Instruct",
        read=config,
        config={"vision_config": VISION_560, "text_config": {**SIZES[size], "rope_scaling": LLAMA_31}},
        stages=STAGES,
        proof=f"{EQUAL}; tokens that see no picture are as Meta's code has them",
    )


ROWS = (_row("11b"), _row("90b"))
