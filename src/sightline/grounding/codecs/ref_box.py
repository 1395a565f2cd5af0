"""What Qwen-VL and InternVL share: `<ref>` around a name, then `<box>` around numbers, the four tags control tokens."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from ...core.geometry import Transform
from ...core.sequence import Image, Part, Piece, Text, Video
from .base import Codec, Grounded, Place, by_label, corners, grounded, only_boxes, original, placed


class RefBox(Codec):
    """A name and its boxes, as shares of the original picture; how numbers are spelled is the family's own.

    tags: what a family calls its tags, where that is not as here. In its question the phrase stands between two.
    """

    tags: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def _spell(self, boxes: Sequence[Sequence[float]]) -> list[str]:
        """The texts between `<box>` and `</box>` for boxes of one name."""

    @abstractmethod
    def _read(self, text: str, tag: str) -> list[Sequence[float]]:
        """The boxes in the text before a closing tag; none where it is malformed."""

    def write(self, places: Sequence[Place], transform: Transform) -> list[Piece]:
        only_boxes(places)
        pieces: list[Piece] = []
        for label, group in by_label(places):
            if label:
                pieces += [self._tag("<ref>"), Piece(label), self._tag("</ref>")]
            for text in self._spell([corners(place, original(transform)) for place in group]):
                pieces += [self._tag("<box>"), Piece(text), self._tag("</box>")]
        return pieces

    def find(self, phrase: str, *pictures: Image | Video) -> tuple[Part, ...]:
        before, after = (Text(text) for text in self.asks.split("{}"))
        parts = (before, self._tag("<ref>"), Text(phrase), self._tag("</ref>"), after)
        return (*pictures, *(part for part in parts if part.text))

    def _tag(self, name: str) -> Piece:
        """A tag as the family calls it."""
        return Piece(self.tags.get(name, name), control=True)

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        """Places in decoded output; an answer may begin inside a box that the prompt has opened."""
        words: list[str] = []
        places: list[Place] = []
        label = ""
        names = {theirs: name for name, theirs in self.tags.items()}
        tags = [names.get(piece.text, piece.text) if piece.control else "" for piece in pieces]
        for i, piece in enumerate(pieces):
            if piece.control:
                continue
            before = tags[i - 1] if i else ""
            after = tags[i + 1] if i + 1 < len(pieces) else ""
            begun = i == 0 or before == after.replace("/", "")
            boxes = self._read(piece.text, after) if begun else []
            places += [placed(shares, original(transform), label) for shares in boxes]
            if not boxes:  # a name lasts until other words come
                label = piece.text.strip() if (before, after) == ("<ref>", "</ref>") else ""
                words.append(piece.text)
        return grounded("".join(words).strip(), places)
