"""Qwen2-VL (arXiv:2409.12191) and Qwen2.5-VL (arXiv:2502.13923): pictures and films at their own size, three axes.

A ViT without a table of positions reads patches of two frames, squares of 2x2 patches become one token by an MLP, and
the decoder, a Qwen2, places tokens by time, height and width. In the second family most of the ViT's blocks look within
squares, and time is counted in seconds.

Published patches come square by square, as they are folded; here they are row-major.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.layout import Medium
from ..core.patches import Grid, Patches, join
from ..core.sequence import Image, Message, Video
from ..data.batch import Batch
from ..data.native_resolution import NativeResolution
from ..data.processor import ImagePipeline
from ..data.template import Writer, chatml
from ..encoders.vit import ViTConfig
from ..fusion.projector import ProjectorConfig
from ..model import VLM, VLMConfig
from .checkpoint import read_tensors
from .configs import Json, act
from .family import CLIP, EQUAL, Family, Habits, Row, scaling
from .inputs import checked, filled
from .keymap import KeyMap, Reshape, flat_patch, rule, stacked
from .language_names import decoder_keys
from .languages import language_config

# what the published configuration classes have by default
VISION: dict[str, Any] = {"depth": 32, "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2}
VISION |= {"spatial_merge_size": 2, "in_channels": 3}
VISION_2 = VISION | {"embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4}
VISION_25 = VISION | {"hidden_size": 3584, "out_hidden_size": 3584, "hidden_act": "silu", "intermediate_size": 3420}
VISION_25 |= {"window_size": 112, "fullatt_block_indexes": (7, 15, 23, 31), "tokens_per_second": 4}
TEXT: dict[str, Any] = {"vocab_size": 152_064, "hidden_size": 8192, "intermediate_size": 29_568, "rms_norm_eps": 1e-5}
TEXT |= {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "rope_theta": 1e6}

DESCRIBED_AT = 448  # side of the picture that a model for any size is described with


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json` of Qwen2-VL, its text half nested or, as published, flat."""
    v = {**VISION_2, **(c.get("vision_config") or {})}
    image = _image(v, v["embed_dim"], int(v["embed_dim"] * v["mlp_ratio"]))
    return _whole(c, image, v["spatial_merge_size"], v["hidden_size"], None)


def config_25(c: Json) -> VLMConfig:
    """Settings from a `config.json` of Qwen2.5-VL."""
    v = {**VISION_25, **(c.get("vision_config") or {})}
    image = replace(
        _image(v, v["hidden_size"], v["intermediate_size"]),
        norm="rms",
        gated=True,
        # squares of whole tokens
        window=v["window_size"] // v["patch_size"] // v["spatial_merge_size"] * v["spatial_merge_size"],
        full_blocks=tuple(v["fullatt_block_indexes"]),
    )
    return _whole(c, image, v["spatial_merge_size"], v["out_hidden_size"], v["tokens_per_second"])


def _image(v: Json, width: int, mlp: int) -> ViTConfig:
    """What the encoders of both families share; the norm before the fold is the encoder's last."""
    return ViTConfig(
        image_size=DESCRIBED_AT // v["patch_size"] * v["patch_size"],
        patch_size=v["patch_size"],
        temporal_patch_size=v["temporal_patch_size"],
        channels=v["in_channels"],
        width=width,
        depth=v["depth"],
        heads=v["num_heads"],
        mlp=mlp,
        activation=act(v["hidden_act"]),
        patch_bias=False,
        positions="none",
        rope_theta=float((v.get("rope_parameters") or {}).get("rope_theta", 10_000.0)),
    )


def _whole(c: Json, image: ViTConfig, fold: int, outputs: int, per_second: float | None) -> VLMConfig:
    """The settings around an encoder; outputs: the width that its file says its tokens have."""
    text = {**TEXT, **(c.get("text_config") or c)}
    text["tie_word_embeddings"] = c.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
    rope = {**(text.pop("rope_scaling", None) or {}), **(text.pop("rope_parameters", None) or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ConfigError(f"rotary positions of kind {kind!r}, expected 'default' or 'mrope'")
    text["rope_theta"] = rope.get("rope_theta", text["rope_theta"])
    section = tuple(rope.get("mrope_section", (16, 24, 24)))
    decoder = replace(language_config({**text, "model_type": "qwen2"}), mrope_section=section)
    if outputs != decoder.width:
        raise ConfigError(f"pictures' tokens of {outputs} numbers for a decoder of width {decoder.width}")
    bridge = ProjectorConfig(inputs=image.width, width=decoder.width, hidden=image.width * fold**2, shuffle=fold)
    return VLMConfig(image, bridge, decoder, tokens_per_second=per_second)


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names of both families."""
    image, block, ours = cfg.vit, "visual.blocks.{i}.", "encoder.blocks.{i}."
    fed = {f"{x}_proj": x for x in ("gate", "up", "down")} if image.gated else {"fc1": "up", "fc2": "down"}
    attention = tuple(f"{ours}attention.{x}.{{p}}" for x in "qkv")
    return KeyMap(
        (
            rule(
                "visual.patch_embed.proj.weight",
                "encoder.patch.weight",
                reshape=flat_patch(image.channels, image.patch_size, image.temporal_patch_size),
            ),
            rule(f"{block}attn.qkv.{{p}}", *attention, reshape=_rows_first(image.heads)),
            rule(f"{block}attn.proj.{{p}}", f"{ours}attention.o.{{p}}"),
            *(rule(f"{block}mlp.{theirs}.{{p}}", f"{ours}feedforward.{name}.{{p}}") for theirs, name in fed.items()),
            *(rule(f"{block}norm{k}.{{p}}", f"{ours}norm{k}.{{p}}") for k in (1, 2)),
            rule("visual.merger.ln_q.{p}", "encoder.norm.{p}"),
            rule("visual.merger.mlp.0.{p}", "fusion.layers.0.{p}"),
            rule("visual.merger.mlp.2.{p}", "fusion.layers.1.{p}"),
        )
    ) + decoder_keys(cfg.decoder).under("", "decoder.")


def _rows_first(heads: int) -> Reshape:
    """Queries, keys and values below each other, of each head the pairs first that the row turns, here the column."""
    packed = stacked(3)

    def swapped(x: Tensor) -> Tensor:
        out: Tensor = x.unflatten(0, (heads, 2, 2, -1)).flip(2).flatten(0, 3)
        return out

    def there(x: Tensor) -> list[Tensor]:
        q, k, v = packed.there(x)
        return [swapped(q), swapped(k), v]

    return Reshape(there, lambda xs: packed.back([swapped(xs[0]), swapped(xs[1]), xs[2]]))


def tensors(c: Json, folder: Path) -> Mapping[str, Tensor]:
    """Tensors of any layout that transformers writes, under the published names."""

    def name(key: str) -> str:
        key = key.replace("model.visual.", "visual.", 1) if key.startswith("model.visual.") else key
        return key.replace("model.language_model.", "model.", 1) if key.startswith("model.language_model.") else key

    return {name(key): value for key, value in read_tensors(folder).items()}


# ----------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class _Item:
    """A picture or film: its tokens' places, counted through the batch, its patches and the seconds of a step."""

    slots: Tensor
    patches: Patches
    seconds: float


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | None = None,
    attention_mask: Tensor | None = None,
    mm_token_type_ids: Tensor | None = None,
) -> Batch:
    """Patches [n, width] of all pictures and of all films, with a grid (time, height, width) in patches for each.

    second_per_grid_ts: seconds of one step of each film's time. mm_token_type_ids say what the ids say already.
    """
    ids = checked(input_ids, attention_mask=attention_mask, mm_token_type_ids=mm_token_type_ids)
    image, film = ids == c.get("image_token_id", 151_655), ids == c.get("video_token_id", 151_656)
    stills = _items(model, image, pixel_values, image_grid_thw, None, ("pixel_values", "image_grid_thw"))
    films = _items(
        model, film, pixel_values_videos, video_grid_thw, second_per_grid_ts, ("pixel_values_videos", "video_grid_thw")
    )
    items = sorted((*stills, *films), key=lambda item: int(item.slots[0]))
    patches = join([item.patches for item in items]) if items else None
    batch = filled(model, ids, image | film, patches, attention_mask)
    assert model.config.axes is not None
    if not items:
        return batch
    layout, length = batch.layout, ids.shape[1]
    position = torch.zeros(*ids.shape, 3, dtype=torch.int64)
    for row in range(len(ids)):
        real = layout.document[row] >= 0
        before = real.long().cumsum(0) - 1  # the real tokens before each
        own = [item for item in items if int(item.slots[0]) // length == row]
        media = [(int(before[int(item.slots[0]) % length]), item.patches.grids[0], item.seconds) for item in own]
        position[row, real] = model.config.axes.positions(int(real.sum()), media)
    medium = layout.medium.masked_fill(film, Medium.VIDEO)
    return replace(batch, layout=replace(layout, position=position, medium=medium))


def _items(
    model: VLM,
    there: Tensor,
    values: Tensor | None,
    grids: Tensor | None,
    seconds: Tensor | None,
    names: tuple[str, str],
) -> Iterator[_Item]:
    """Pictures, or films, whose tokens stand where `there` [batch, length] is true."""
    slots = there.flatten().nonzero()[:, 0]
    if values is None or grids is None:
        if values is not None or grids is not None or len(slots):
            raise InputError(f"{len(slots)} tokens of {names[0]}, expected {names[0]} and {names[1]} for them")
        return
    shapes: list[Grid] = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()] if grids.dim() == 2 else []
    if grids.dim() != 2 or grids.shape[1] != 3 or values.dim() != 2:
        raise InputError(f"{names[0]} {list(values.shape)} and {names[1]} {list(grids.shape)}, expected [n, d], [m, 3]")
    if sum(t * h * w for t, h, w in shapes) != len(values):
        raise InputError(f"{names[0]} holds {len(values)} patches, the grids of {names[1]} another number")
    counts = [model.num_tokens(grid) for grid in shapes]
    if sum(counts) != len(slots):
        raise InputError(f"{len(slots)} tokens of {names[0]} in input_ids, {names[1]} needs {sum(counts)}")
    if seconds is not None and len(seconds) != len(shapes):
        raise InputError(f"second_per_grid_ts has {len(seconds)} numbers for {len(shapes)} films")
    fold = model.config.axes.fold if model.config.axes else 1
    parts = values.to(model.dtype).split([t * h * w for t, h, w in shapes])
    for n, (own, part, grid) in enumerate(zip(slots.split(counts), parts, shapes, strict=True)):
        first, last = int(own[0]), int(own[-1])
        if last - first != len(own) - 1 or first // there.shape[1] != last // there.shape[1]:
            raise InputError(f"item {n + 1} of {names[0]} has its tokens apart, expected {len(own)} in a row")
        yield _Item(own, Patches(row_major(part, grid, fold), (grid,)), 1.0 if seconds is None else float(seconds[n]))


def row_major(values: Tensor, grid: Grid, fold: int) -> Tensor:
    """Patches [t*h*w, width] that come square by square, `fold` a side, row by row."""
    frames, rows, columns = grid
    cut = values.view(frames, rows // fold, columns // fold, fold, fold, -1)
    return cut.permute(0, 1, 3, 2, 4, 5).reshape(len(values), -1)


# -------------------------------------------------------------------------------------------------------- processor

IMAGE, FILM = "<|image_pad|>", "<|video_pad|>"


def _said(out: Writer, message: Message) -> None:
    """What a user says, pictures and films between tokens of theirs."""
    for part in message.parts:
        if isinstance(part, (Image, Video)):
            out.control("<|vision_start|>")
            out.image()
            out.control("<|vision_end|>")
        else:
            out.parts(Message("user", (part,)))


template = chatml(_said, "You are a helpful assistant.")


def pixels(c: Json, side: int) -> ImagePipeline:
    """From a `preprocessor_config.json`, whose bounds are for films as well."""
    usual, size = NativeResolution(), c.get("size") or {}
    least = size.get("shortest_edge", size.get("min_pixels", c.get("min_pixels")))
    most = size.get("longest_edge", size.get("max_pixels", c.get("max_pixels")))
    stills, films = ((least or default[0], most or default[1]) for default in (usual.area, usual.film_area))
    return NativeResolution(
        multiple=c.get("patch_size", 14) * c.get("merge_size", 2),
        frames=c.get("temporal_patch_size", 2),
        area=stills,
        film_area=films,
        scaling=scaling(c, CLIP),
    )


# ------------------------------------------------------------------------------------------------- families and rows


def _habits(codec: str) -> Habits:
    return Habits(template, IMAGE, codec, bos="", end="<|im_end|>", pixels=pixels, video=FILM)


FAMILIES = {
    "qwen2_vl": Family(lambda c, f: VLM(config(c)), keys, tensors, inputs, habits=_habits("qwen2-vl")),
    "qwen2_5_vl": Family(lambda c, f: VLM(config_25(c)), keys, tensors, inputs, habits=_habits("qwen2.5-vl")),
}

# widths, layers, heads, heads of keys, feed-forward, vocabulary, head tied to the table
SIZES = {
    "2-2b": (1536, 28, 12, 2, 8960, 151_936, True),
    "2-7b": (3584, 28, 28, 4, 18_944, 152_064, False),
    "2.5-3b": (2048, 36, 16, 2, 11_008, 151_936, True),
    "2.5-7b": (3584, 28, 28, 4, 18_944, 152_064, False),
}
STAGES = {"pretrain": ("encoder.*", "fusion.*"), "multitask": ("*",), "instruct": ("decoder.*",)}


def _row(version: str, size: str, licence: str) -> Row:
    width, depth, heads, kv_heads, mlp, vocabulary, tied = SIZES[f"{version}-{size}"]
    later = version == "2.5"
    text = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "rms_norm_eps": 1e-6}
    text |= {"num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocabulary}
    text |= {"tie_word_embeddings": tied, "max_position_embeddings": 128_000 if later else 32_768}
    vision: dict[str, Any] = {"out_hidden_size": width, "hidden_size": 1280, "tokens_per_second": 2} if later else {}
    return Row(
        name=f"qwen{version}-vl-{size}-instruct",
        family=f"Qwen{version}-VL",
        encoder=f"ViT-H/14 of any size{', in windows' if later else ''}",
        fusion="2x2 patches folded into one, MLP of 2 layers",
        llm=f"Qwen{version} {size.upper()}",
        licence=licence,
        source=f"Qwen/Qwen{version}-VL-{size.upper()}-Instruct",
        read=config_25 if later else config,
        config={**text, "vision_config": vision or {"hidden_size": width}},
        stages=STAGES,
        proof=EQUAL,
    )


ROWS = (
    _row("2", "2b", "Apache-2.0"),
    _row("2", "7b", "Apache-2.0"),
    _row("2.5", "3b", "Qwen Research"),
    _row("2.5", "7b", "Apache-2.0"),
)
