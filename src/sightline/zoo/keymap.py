"""Names and layouts of published checkpoints, as data that reads in both directions.

A rule pairs one published name with one or more of ours. Every key must meet exactly one rule; a key without one, or a
parameter of ours without a published name, is an error that names a few of them.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from ..core.errors import CheckpointError

Tensors = list[Tensor]


@dataclass(frozen=True)
class Reshape:
    """How tensors change between the two sides; back(there(x)) == x."""

    there: Callable[[Tensor], Tensors]
    back: Callable[[Tensors], Tensor]


SAME = Reshape(there=lambda x: [x], back=lambda xs: xs[0])


def flat_patch(channels: int, patch: int, *frames: int) -> Reshape:
    """A convolution that cuts patches [width, channels, (frames,) patch, patch] as the linear map that it is."""
    return Reshape(
        there=lambda x: [x.flatten(1)],
        back=lambda xs: xs[0].unflatten(1, (channels, *frames, patch, patch)),
    )


def by_head(heads: int, count: int) -> Reshape:
    """Several maps of one size published as one, the rows of one head of each map next to each other."""

    def there(x: Tensor) -> Tensors:
        cut = x.unflatten(0, (heads, count, -1))
        return [cut[:, k].flatten(0, 1) for k in range(count)]

    def back(xs: Tensors) -> Tensor:
        joined: Tensor = xs[0].new_empty((heads, count, len(xs[0]) // heads, *xs[0].shape[1:]))
        for k, x in enumerate(xs):
            joined[:, k] = x.unflatten(0, (heads, -1))
        return joined.flatten(0, 2)

    return Reshape(there, back)


def half_apart(dim: int) -> Reshape:
    """A map to queries or keys published with the two rows that rotary positions turn together next to each other.

    Ours are half a head of `dim` numbers apart, as in `layers.rotary`; their products are the same.
    """

    def there(x: Tensor) -> Tensors:
        return [x.unflatten(0, (-1, dim // 2, 2)).transpose(1, 2).flatten(0, 2)]

    def back(xs: Tensors) -> Tensor:
        paired: Tensor = xs[0].unflatten(0, (-1, 2, dim // 2)).transpose(1, 2)
        return paired.flatten(0, 2)

    return Reshape(there, back)


def last_first() -> Reshape:
    """A table whose last row is that of a token that comes first here."""
    return Reshape(there=lambda x: [x.roll(1, 0)], back=lambda xs: xs[0].roll(-1, 0))


def leading(ones: int) -> Reshape:
    """A tensor published with `ones` leading dimensions of one."""
    return Reshape(
        there=lambda x: [x.reshape(x.shape[ones:])],
        back=lambda xs: xs[0].reshape((1,) * ones + tuple(xs[0].shape)),
    )


def stacked(count: int) -> Reshape:
    """Several maps of one size published as one, below each other."""

    def back(xs: Tensors) -> Tensor:
        joined: Tensor = xs[0].new_empty((len(xs[0]) * count, *xs[0].shape[1:]))
        for part, x in zip(joined.chunk(count), xs, strict=True):
            part.copy_(x)
        return joined

    return Reshape(there=lambda x: list(x.chunk(count)), back=back)


def halves() -> Reshape:
    """Two maps published as one, the first half first."""
    return stacked(2)


def flipped() -> Reshape:
    """A matrix [inputs, outputs] that is multiplied from the right, as the linear map that it is."""
    return Reshape(there=lambda x: [x.T], back=lambda xs: xs[0].T)


@dataclass(frozen=True)
class Rule:
    """One published name and ours; `{i}` stands for a number, `{p}` for one word without dots."""

    theirs: str
    ours: tuple[str, ...]
    reshape: Reshape = SAME


def rule(theirs: str, *ours: str, reshape: Reshape = SAME) -> Rule:
    """A rule; without a reshape it is a rename."""
    return Rule(theirs, ours, reshape)


@lru_cache(maxsize=4096)
def pattern(template: str) -> re.Pattern[str]:
    """The expression of a name with fields."""

    def field(found: re.Match[str]) -> str:
        return rf"(?P<{found[1]}>\d+)" if found[1] in "ij" else rf"(?P<{found[1]}>\w+)"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", field, re.escape(template)))


@dataclass(frozen=True)
class KeyMap:
    """The rules of one checkpoint layout, and published keys that carry nothing this project uses."""

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()

    def under(self, theirs: str, ours: str) -> "KeyMap":
        """The same map for a part that sits inside a larger model."""
        moved = tuple(
            replace(r, theirs=theirs + r.theirs, ours=tuple(ours + name for name in r.ours)) for r in self.rules
        )
        return KeyMap(moved, tuple(theirs + name for name in self.ignore))

    def numbered(self, numbers: Mapping[int, int]) -> "KeyMap":
        """The same map where each number `{i}` of theirs is another one of ours."""
        rules: list[Rule] = []
        for r in self.rules:
            if "{i}" not in r.theirs:
                rules.append(r)
                continue
            for theirs, ours in numbers.items():
                named = tuple(name.replace("{i}", str(ours)) for name in r.ours)
                rules.append(replace(r, theirs=r.theirs.replace("{i}", str(theirs)), ours=named))
        return KeyMap(tuple(rules), self.ignore)

    def __add__(self, other: "KeyMap") -> "KeyMap":
        return KeyMap(self.rules + other.rules, self.ignore + other.ignore)

    def joins(self, ours: Collection[str]) -> dict[str, tuple[tuple[str, ...], Reshape]]:
        """The published names of some of ours, each with the names that it is made of, in order, and how."""
        found: dict[str, tuple[tuple[str, ...], Reshape]] = {}
        for r in self.rules:
            for match in [m for key in ours if (m := pattern(r.ours[0]).fullmatch(key))]:
                fields = match.groupdict()
                found[r.theirs.format(**fields)] = tuple(name.format(**fields) for name in r.ours), r.reshape
        return found

    def load(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published tensors under our names."""
        ours: dict[str, Tensor] = {}
        unknown: list[str] = []
        for key, value in theirs.items():
            if any(pattern(name).fullmatch(key) for name in self.ignore):
                continue
            found = [(r, match) for r in self.rules if (match := pattern(r.theirs).fullmatch(key))]
            if len(found) != 1:
                unknown.append(key)
                continue
            chosen, match = found[0]
            for name, tensor in zip(chosen.ours, chosen.reshape.there(value), strict=True):
                mine = name.format(**match.groupdict())
                if mine in ours:
                    raise CheckpointError(f"{key} is one of several tensors for the parameter {mine}")
                ours[mine] = tensor
        if unknown:
            raise CheckpointError(f"{len(unknown)} tensors that this model has no place for, such as {_few(unknown)}")
        return ours

    def save(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under their published names."""
        theirs: dict[str, Tensor] = {}
        left = dict(ours)
        for r in self.rules:
            for match in [m for key in ours if (m := pattern(r.ours[0]).fullmatch(key))]:
                fields = match.groupdict()
                names = [name.format(**fields) for name in r.ours]
                if absent := [name for name in names if name not in left]:
                    state = "has two published names" if absent[0] in ours else "is missing"
                    raise CheckpointError(f"the parameter {absent[0]} {state}, expected one rule for it")
                theirs[r.theirs.format(**fields)] = r.reshape.back([left.pop(name) for name in names])
        if left:
            raise CheckpointError(f"{len(left)} parameters without a published name, such as {_few(sorted(left))}")
        return theirs


def _few(names: list[str]) -> str:
    return ", ".join(names[:3])
