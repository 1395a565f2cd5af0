"""What Qwen-VL and InternVL share: `<ref>` around a name, then `<box>` around numbers, the four tags control tokens."""

from abc import abstractmethod
from collections.abc import Sequence

from ...core.geometry import Transform
from ...core.sequence import Piece
from .base import Codec, Grounded, Place, by_label, corners, grounded, only_boxes, original, placed


class RefBox(Codec):
    """A name and its boxes, as shares of the original picture; how numbers are spelled is the family's own."""

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
                pieces += [Piece("<ref>", control=True), Piece(label), Piece("</ref>", control=True)]
            for text in self._spell([corners(place, original(transform)) for place in group]):
                pieces += [Piece("<box>", control=True), Piece(text), Piece("</box>", control=True)]
        return pieces

    def decode(self, pieces: Sequence[Piece], transform: Transform) -> Grounded:
        """Places in decoded output; an answer may begin inside a box that the prompt has opened."""
        words: list[str] = []
        places: list[Place] = []
        label = ""
        for i, piece in enumerate(pieces):
            if piece.control:
                continue
            before = pieces[i - 1].text if i and pieces[i - 1].control else ""
            after = pieces[i + 1].text if i + 1 < len(pieces) and pieces[i + 1].control else ""
            begun = i == 0 or before == after.replace("/", "")
            boxes = self._read(piece.text, after) if begun else []
            places += [placed(shares, original(transform), label) for shares in boxes]
            if not boxes:  # a name lasts until other words come
                label = piece.text.strip() if (before, after) == ("<ref>", "</ref>") else ""
                words.append(piece.text)
        return grounded("".join(words).strip(), places)
