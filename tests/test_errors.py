"""The error tree: as drawn in its module's docstring, one HTTP status and one exit code each."""

import re
from collections.abc import Iterator

import pytest

import sightline
from sightline.core import errors
from sightline.core.errors import SightlineError


def tree(kind: type[SightlineError], depth: int = 0) -> Iterator[tuple[int, type[SightlineError]]]:
    """Every class below `kind` with its depth, in the order of definition."""
    yield depth, kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


CLASSES = [kind for _, kind in tree(SightlineError)]


def test_the_drawing_matches_the_classes() -> None:
    drawn = re.findall(r"^([│ ]*)(?:[├└]── )?(\w+Error)\b.*?(?:HTTP (\d+))?$", errors.__doc__ or "", re.MULTILINE)
    found = [(bool(status) + len(indent) // 4, name) for indent, name, status in drawn]
    assert found == [(depth, kind.__name__) for depth, kind in tree(SightlineError)]
    assert {name: int(status) for _, name, status in drawn if status} == {
        kind.__name__: kind.http_status for kind in CLASSES[1:]
    }


def test_every_error_of_the_module_is_in_the_tree() -> None:
    defined = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert set(defined) == set(CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_public_and_explained(kind: type[SightlineError]) -> None:
    assert getattr(sightline, kind.__name__) is kind
    assert kind.__doc__
    assert 400 <= kind.http_status < 600
    assert kind.exit_code == (69 if kind is errors.RemoteError else 2)  # sysexits.h: a service is unavailable
    assert str(kind("found 1, expected 2")) == "found 1, expected 2"
