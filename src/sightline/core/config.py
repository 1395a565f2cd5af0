"""Frozen configuration values and their plain forms: dicts, YAML, dotted overrides.

A configuration is a frozen pydantic dataclass that refuses unknown keys. Every failure is one ConfigError line that
names the key, what was found and, for an unknown name, the nearest known one.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, dataclass_transform

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from .errors import ConfigError

T = TypeVar("T")
_C = TypeVar("_C", bound=type)


@dataclass_transform(frozen_default=True)
def config(cls: _C) -> _C:
    """Make a class of annotated fields a frozen, validated dataclass that refuses unknown keys."""
    made = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))(cls)
    return cast(_C, made)


def nearest(name: str, known: Iterable[str]) -> str:
    """The ending of a message about an unknown name: the nearest known one, or all when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}" if names else ""


def to_dict(value: Any) -> Any:
    """A configuration as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return value


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a configuration from a mapping; ConfigError tells the first thing that is wrong with it."""
    try:
        return TypeAdapter(cls).validate_python(dict(data))
    except ValidationError as error:
        raise ConfigError(_explain(cls, error, where)) from None


def _explain(cls: type, error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    prefix = f"{where}: " if where else ""
    name = ".".join(path)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{prefix}unknown key {name!r}{nearest(path[-1], _fields_at(cls, path[:-1]))}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{prefix}key {name!r} is missing from {cls.__name__}"
    return f"{prefix}{name or cls.__name__} = {first['input']!r}: {first['msg'].lower()}"


def _fields_at(cls: type, path: Sequence[str]) -> list[str]:
    """Field names of the dataclass that a dotted path leads to."""
    here: Any = cls
    for part in path:
        kinds = {f.name: f.type for f in dataclasses.fields(here)} if dataclasses.is_dataclass(here) else {}
        here = kinds.get(part, here)
    return [f.name for f in dataclasses.fields(here)] if dataclasses.is_dataclass(here) else []


def override(value: T, settings: Iterable[str]) -> T:
    """A copy with dotted settings applied, such as `stages.1.steps=20`; values are read as YAML."""
    data = to_dict(value)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise ConfigError(f"override {setting!r}: expected KEY=VALUE with a dotted key")
        _set(data, key.split("."), yaml.safe_load(text), key)
    return from_dict(type(value), data)


def _set(data: Any, path: list[str], new: Any, key: str) -> None:
    here = data
    for i, part in enumerate(path):
        last = i == len(path) - 1
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                raise ConfigError(f"override {key!r}: {part!r} is not an index below {len(here)}")
            index: Any = int(part)
        elif isinstance(here, dict):
            if part not in here:
                raise ConfigError(f"override {key!r}: unknown key {part!r}{nearest(part, here)}")
            index = part
        else:
            raise ConfigError(f"override {key!r}: {'.'.join(path[:i])!r} is a single value, it has no {part!r}")
        if last:
            here[index] = new
        else:
            here = here[index]


def load_yaml(cls: type[T], path: Path) -> T:
    """Read a configuration from a YAML file."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}".splitlines()[0]) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(data).__name__}")
    return from_dict(cls, data, str(path))


def save_yaml(value: Any, path: Path) -> None:
    """Write a configuration as YAML, keys in their declared order."""
    path.write_text(yaml.safe_dump(to_dict(value), sort_keys=False))
