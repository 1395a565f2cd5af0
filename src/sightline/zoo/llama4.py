"""Llama 4: an encoder of tiles with rotary positions, patches folded by a pixel-shuffle MLP, a mixture of experts.

The adapter's two layers and the projector are one of three, with an activation between each.
"""

from collections.abc import Sequence

from ..core.errors import ConfigError
from ..data.images import Scaling, Seen
from ..data.processor import ImagePipeline
from ..data.template import headed
from ..data.tiles import Canvas
from ..fusion.projector import ProjectorConfig
from ..model import VLM, VLMConfig
from .backbones import llama4_vision_config
from .configs import Json
from .encoder_names import llama4_vision_keys
from .family import LOGITS, Family, Habits, Row, scaling, side_of
from .keymap import KeyMap, rule
from .language_names import llama4_keys
from .languages import language_config


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`."""
    text = {**(c.get("text_config") or {}), "model_type": "llama4_text"}
    return VLMConfig(llama4_vision_config(c.get("vision_config") or {}), projector_config(c), language_config(text))


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    return (
        llama4_vision_keys(cfg.vit).under("vision_model.", "encoder.")
        + projector_keys().under("", "fusion.")
        + llama4_keys(cfg.decoder).under("language_model.", "decoder.")
    )


def projector_config(c: Json) -> ProjectorConfig:
    """From its `config.json`."""
    vision, text = c.get("vision_config") or {}, c.get("text_config") or {}
    inner, out = vision.get("projector_input_dim", 4096), vision.get("projector_output_dim", 4096)
    if not inner == out == vision.get("vision_output_dim", 7680):
        raise ConfigError(f"projector_input_dim {inner} and projector_output_dim {out}, expected the same size")
    return ProjectorConfig(
        inputs=vision.get("hidden_size", 768),
        width=text.get("hidden_size", 5120),
        layers=3,
        hidden=out,
        bias=False,
        shuffle=round(1 / vision.get("pixel_shuffle_ratio", 0.5)),
    )


def projector_keys() -> KeyMap:
    """The published names."""
    return KeyMap(
        (
            rule("vision_model.vision_adapter.mlp.fc1.{p}", "layers.0.{p}"),
            rule("vision_model.vision_adapter.mlp.fc2.{p}", "layers.1.{p}"),
            rule("multi_modal_projector.linear_1.{p}", "layers.2.{p}"),
        )
    )


# ------------------------------------------------------------------------------------------------------- processors


template = headed("<|header_start|>", "<|header_end|>", "<|eot|>")


def separated(seen: Seen, counts: Sequence[int]) -> Sequence[int | str]:
    """A picture's tiles with a token between those of a row and one after each row; then the whole picture."""
    rows, columns = seen.tiles
    parts: list[int | str] = ["<|image_start|>"]
    if rows * columns > 1:
        for row in range(rows):
            for column in range(columns):
                parts += ["<|tile_x_separator|>"] if column else []
                parts.append(counts[row * columns + column])
            parts.append("<|tile_y_separator|>")
    return [*parts, "<|image|>", counts[-1], "<|image_end|>"]


def _canvas(c: Json, side: int) -> ImagePipeline:
    return Canvas(
        size=side_of(c.get("size", side)),
        max_tiles=c.get("max_patches", 16),
        enlarged=c.get("resize_to_max_canvas", False),
        scaling=scaling({"resample": 2, **c}, Scaling()),
    )


FAMILIES = {
    "llama4": Family(
        lambda c, f: VLM(config(c)),
        keys,
        habits=Habits(
            template,
            "<|patch|>",
            bos="<|begin_of_text|>",
            end="<|eot|>",
            pixels=_canvas,
            expand=separated,
            picture="<|image|>",
        ),
    )
}

# meta-llama/Llama-4-Scout-17B-16E, its config.json
VISION = {"hidden_size": 1408, "num_hidden_layers": 34, "num_attention_heads": 16, "intermediate_size": 5632}
VISION |= {"image_size": 336, "patch_size": 14, "projector_input_dim": 4096, "projector_output_dim": 4096}
VISION |= {"vision_output_dim": 4096}
TEXT = {"hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8}
TEXT |= {"intermediate_size": 8192, "intermediate_size_mlp": 16_384, "num_local_experts": 16, "vocab_size": 202_048}
# every wave longer than the first context is stretched, none beside it
ROPE: dict[str, object] = {"rope_theta": 5e5}
ROPE["rope_scaling"] = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

SCOUT = Row(
    name="llama-4-scout",
    family="Llama 4",
    encoder="Llama-4 ViT/14 336",
    fusion="2x2 patches folded into one, MLP of 3 layers",
    llm="Llama 4 109B, 16 experts",
    licence="Llama 4",
    source="meta-llama/Llama-4-Scout-17B-16E-Instruct",
    read=config,
    config={"vision_config": VISION, "text_config": {**TEXT, "max_position_embeddings": 10_485_760, **ROPE}},
    proof=LOGITS,
)

ROWS = (SCOUT,)
