"""Frozen configuration values and their plain forms: dicts, YAML, dotted overrides.

A configuration is a frozen pydantic dataclass that refuses unknown keys. Every failure is one ConfigError line that
names the key, what was found and, for an unknown name, the nearest known one.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, dataclass_transform, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from .errors import ConfigError

EXPECTED = {
    "dataclass_type": "expected keys and values",
    "dict_type": "expected keys and values",
    "tuple_type": "expected a list",
}

T = TypeVar("T")
_C = TypeVar("_C", bound=type)


@dataclass_transform(frozen_default=True)
def config(cls: _C) -> _C:
    """Make a class of annotated fields a frozen, validated dataclass that refuses unknown keys."""
    made = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))(cls)
    return cast(_C, made)


def nearest(name: str, known: Iterable[str], listed: Iterable[str] = ()) -> str:
    """The ending of a message about an unknown name: the nearest known one, or all, or `listed`, when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    names = sorted(listed) or names
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
    prefix = f"{where}: " if where else ""
    _check_names(cls, data, (), prefix)
    try:
        return TypeAdapter(cls).validate_python(dict(data))
    except ValidationError as error:
        raise ConfigError(prefix + explain(error, data)) from None


def _check_names(kind: Any, data: Any, path: tuple[str, ...], prefix: str) -> None:
    """Refuse an unknown key or kind at any depth, where pydantic would not tell the nearest known one."""
    kind = _member(kind, data, path, prefix)
    inner = get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(data, Mapping):
        fields = get_type_hints(kind)
        for key, value in data.items():
            if key not in fields:
                name = ".".join((*path, str(key)))
                raise ConfigError(f"{prefix}unknown key {name!r}{nearest(str(key), fields)}")
            _check_names(fields[key], value, (*path, str(key)), prefix)
    elif get_origin(kind) is dict and isinstance(data, Mapping):
        for key, value in data.items():
            _check_names(inner[1], value, (*path, str(key)), prefix)
    elif get_origin(kind) in (list, tuple) and isinstance(data, (list, tuple)) and inner:
        for i, value in enumerate(data):
            _check_names(inner[0], value, (*path, str(i)), prefix)  # every tuple of values holds one type


def _member(kind: Any, data: Any, path: tuple[str, ...], prefix: str) -> Any:
    """The member of a union that plain data means by its `kind`; any other type is returned as it is.

    Data without one means the only member that has none, if there is such a member.
    """
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    members = [m for m in get_args(kind) if dataclasses.is_dataclass(m)]
    if get_origin(kind) not in (Union, UnionType) or not members or not isinstance(data, Mapping):
        return kind
    if len(members) == 1:
        return members[0]
    kinds = {name: m for m in members for name in get_args(get_type_hints(m).get("kind"))}
    if (chosen := data.get("kind")) is None:
        plain = [m for m in members if "kind" not in get_type_hints(m)]  # what has no kind is meant by data without one
        return plain[0] if len(plain) == 1 else kind
    if chosen not in kinds:
        name = ".".join((*path, "kind"))
        raise ConfigError(f"{prefix}unknown {name} {chosen!r}{nearest(str(chosen), kinds)}")
    return kinds[chosen]


def explain(error: ValidationError, data: Any = None) -> str:
    """The first value that is wrong, where it stands in the data and what was expected, in one line."""
    found = error.errors()
    # a union reports every member: leave out those that the data's own `kind` rules out
    unfit = ("literal_error", "unexpected_keyword_argument")
    others = [e["loc"][:-1] for e in found if e["type"] in unfit and e["loc"][-1] == "kind"]
    first = next((e for e in found if not any(e["loc"][: len(o)] == o for o in others)), found[0])
    name = ".".join(map(str, first["loc"]) if data is None else _keys(first["loc"], data))
    if first["type"] in ("missing", "missing_argument"):
        return f"key {name!r} is missing from {error.title}"
    # of a class, a tuple or a dictionary in the message nobody who writes a file knows
    wrong = EXPECTED.get(first["type"], first["msg"].lower())
    return f"{name or error.title} = {_shown(first['input'])}: {wrong}"


def _keys(place: tuple[int | str, ...], data: Any) -> Iterator[str]:
    """The keys of a place in some data, without what pydantic puts between them: which member of a union it means."""
    for number, part in enumerate(place, 1):
        if isinstance(data, Mapping) and (part in data or number == len(place)):
            data = data.get(part)
        elif isinstance(data, (list, tuple)) and isinstance(part, int):
            data = data[part] if part < len(data) else None
        else:
            continue
        yield str(part)


def _shown(value: Any) -> str:
    """A value that is wrong, so far as it fits into a line."""
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:80]}…"


def override(value: T, settings: Iterable[str]) -> T:
    """A copy with dotted settings applied, such as `stages.1.steps=20`; values are read as YAML."""
    data = to_dict(value)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise ConfigError(f"override {setting!r}: expected KEY=VALUE with a dotted key")
        try:
            new = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {setting!r}: {str(error).splitlines()[0]}") from None
        _set(data, key.split("."), new, key)
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
    return from_dict(cls, read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, of which JSON is one."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text in UTF-8, expected YAML") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f":{mark.line + 1}"
        raise ConfigError(f"{path}{where}: {getattr(error, 'problem', None) or error}".splitlines()[0]) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, found {'nothing' if data is None else repr(data)[:60]}")
    return data


def save_yaml(value: Any, path: Path) -> None:
    """Write a configuration as YAML, keys in their declared order."""
    path.write_text(yaml.safe_dump(to_dict(value), sort_keys=False))
