"""CogVLM's adapter (arXiv:2311.03079): settings and names."""

from ..fusion.glu import GLUConfig
from .backbones import Json
from .keymap import KeyMap, leading, rule


def adapter_config(c: Json) -> GLUConfig:
    """From its `config.json`; the adapter is as wide inside as the decoder's feed-forward."""
    return GLUConfig(inputs=c["vision_config"]["hidden_size"], width=c["hidden_size"], hidden=c["intermediate_size"])


def adapter_keys() -> KeyMap:
    """The published names, below `model.vision.`."""
    return KeyMap(
        (
            rule("boi", "begin", reshape=leading(2)),
            rule("eoi", "end", reshape=leading(2)),
            rule("linear_proj.linear_proj.{p}", "project.{p}"),
            rule("linear_proj.norm1.{p}", "norm.{p}"),
            rule("linear_proj.gate_proj.{p}", "feedforward.gate.{p}"),
            rule("linear_proj.dense_h_to_4h.{p}", "feedforward.up.{p}"),
            rule("linear_proj.dense_4h_to_h.{p}", "feedforward.down.{p}"),
        )
    )
