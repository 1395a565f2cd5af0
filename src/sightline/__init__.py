"""Vision-language models from four choices: vision encoder, fusion, training recipe, grounding.

Names are fetched when they are first asked for, so `import sightline` costs milliseconds and never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, where type checkers and editors look for them
    from .core.errors import (
        CapacityError as CapacityError,
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        DataError as DataError,
        InputError as InputError,
        RemoteError as RemoteError,
        SightlineError as SightlineError,
    )
    from .core.geometry import Box as Box, Frame as Frame, Point as Point
    from .core.sequence import (
        Audio as Audio,
        Conversation as Conversation,
        Image as Image,
        Message as Message,
        Region as Region,
        Text as Text,
        Video as Video,
    )
    from .model import VLM as VLM, VLMConfig as VLMConfig
    from .serving.assistant import Assistant as Assistant, load as load
    from .serving.remote import reach as reach
    from .serving.sampling import Sampling as Sampling
    from .serving.talker import Answer as Answer

_HOME = {
    "core.errors": (
        "SightlineError",
        "ConfigError",
        "CheckpointError",
        "DataError",
        "InputError",
        "CapacityError",
        "RemoteError",
    ),
    "core.geometry": ("Box", "Frame", "Point"),
    "core.sequence": ("Audio", "Conversation", "Image", "Message", "Region", "Text", "Video"),
    "model": ("VLM", "VLMConfig"),
    "serving.assistant": ("Assistant", "load"),
    "serving.remote": ("reach",),
    "serving.sampling": ("Sampling",),
    "serving.talker": ("Answer",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
