"""InternVL's projector (arXiv:2404.16821): settings and names of both its layouts."""

from ..core.errors import ConfigError
from ..fusion.projector import ProjectorConfig
from .backbones import Json, act
from .keymap import KeyMap, rule


def projector_config(c: Json, inputs: int, width: int) -> ProjectorConfig:
    """From a `config.json` of either layout; inputs, width: the encoder's and the decoder's."""
    ratio, order = c.get("downsample_ratio", 0.5), c.get("ps_version", "v2")
    if order not in ("v1", "v2"):
        raise ConfigError(f"ps_version {order!r}, expected 'v1' or 'v2'")
    return ProjectorConfig(
        inputs=inputs,
        width=width,
        activation=act(c.get("projector_hidden_act", "gelu")),
        shuffle=round(1 / ratio),
        norm=True,
        transposed=order == "v1",
    )


def projector_keys() -> KeyMap:
    """The names that transformers writes, below `multi_modal_projector.`."""
    return KeyMap(
        (
            rule("layer_norm.{p}", "norm.{p}"),
            rule("linear_1.{p}", "layers.0.{p}"),
            rule("linear_2.{p}", "layers.1.{p}"),
        )
    )


def original_projector_keys() -> KeyMap:
    """The names of OpenGVLab/InternVL, below `mlp1.`."""
    return KeyMap((rule("0.{p}", "norm.{p}"), rule("1.{p}", "layers.0.{p}"), rule("3.{p}", "layers.1.{p}")))
