"""What reading any published `config.json` takes: its names of activations and rotary positions, what is refused."""

from collections.abc import Mapping
from typing import Any

from ..core.config import nearest
from ..core.errors import ConfigError
from ..layers.rotary import RopeScaling

Json = Mapping[str, Any]

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
    "linear": "none",
}


def act(name: str) -> str:
    """Our name of a published activation."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def expect(c: Json, **wanted: Any) -> None:
    """Refuse a configuration that says anything else of these keys, if it says something of them."""
    for key, value in wanted.items():
        if c.get(key) not in (None, value):
            raise ConfigError(f"{key} is {c[key]!r}, expected {value!r}")


ROPES = ("default", "linear", "dynamic", "llama3")


def rope(c: Json, max_length: int, theta: float = 10_000.0, fraction: float = 1.0) -> dict[str, Any]:
    """Rotary settings in the layouts of transformers 4 and 5; a scaling that is not known is refused."""
    found = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPES:
        raise ConfigError(f"rotary positions of kind {kind!r}, expected one of {', '.join(map(repr, ROPES))}")
    scaling = None
    if kind == "llama3":
        waves = {"low": found["low_freq_factor"], "high": found["high_freq_factor"]}
        scaling = RopeScaling("llama3", found["factor"], found["original_max_position_embeddings"], **waves)
    elif kind != "default":
        scaling = RopeScaling(kind, found["factor"], max_length)
    return {
        "rope_theta": float(found.get("rope_theta") or c.get("rope_theta") or theta),
        "rope_scaling": scaling,
        "rotary_fraction": found.get("partial_rotary_factor", c.get("partial_rotary_factor", fraction)),
    }
