"""Llama-4's pixel-shuffle MLP and projector, three layers with an activation between each: settings and names."""

from ..core.errors import ConfigError
from ..fusion.projector import ProjectorConfig
from .backbones import Json
from .keymap import KeyMap, rule


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
