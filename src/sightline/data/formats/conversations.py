"""Conversations as rows: LLaVA's and ShareGPT4V's JSON, and messages as OpenAI's API takes them."""

import re
from typing import Any

from ...core.errors import DataError
from ...core.sequence import Image, Message, Part, Role, Text, Video
from .base import Files, Reader, Record, Rows, checked, dialogue, role_of, take, text

LLAVA_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
OPENAI_ROLES: dict[str, Role] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
PLACES = re.compile(r"\n*(<image>|<video>)\n*")


class RowReader(Reader):
    """A reader whose samples are the rows of one file."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self.rows = Rows(files.path)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows.name(index)


class Llava(RowReader):
    """Rows of `conversations`, with `<image>` and `<video>` where pictures and videos go (haotian-liu/LLaVA).

    `image` is a path or several; `video` is a folder of frames or a list of them, with `times` in seconds or `fps`. A
    row may have neither. Line breaks around a placeholder belong to LLaVA's template, which writes them again.
    """

    def read(self, index: int) -> Record:
        row = self.rows[index]
        media: dict[str, list[Any]] = {"<image>": _several(row.get("image")), "<video>": []}
        if row.get("video") is not None:
            media["<video>"].append(row["video"])
        turns = take(row, "conversations", list)
        said = [text(take(turn, "value", str), "a turn") for turn in turns]
        for place, found in media.items():
            if (count := sum(each.count(place) for each in said)) != len(found):
                raise DataError(f"{len(found)} {place[1:-1]}s for {count} placeholders {place}")
        messages = []
        for turn, words in zip(turns, said, strict=True):
            parts: list[Part] = []
            for piece in PLACES.split(words):
                if piece == "<image>":
                    parts.append(self.picture(media[piece].pop(0)))
                elif piece == "<video>":
                    parts.append(self.video(media[piece].pop(0), row.get("times"), row.get("fps", 1.0)))
                elif piece:
                    parts.append(Text(piece))
            role = role_of(take(turn, "from", str), LLAVA_ROLES)
            if role != "user" and any(isinstance(part, (Image, Video)) for part in parts):
                raise DataError("a placeholder in an answer")
            messages.append(Message(role, tuple(parts)))
        # long talks of ShareGPT were cut into rows, some of which begin with an answer; LLaVA's code leaves that out
        cut = len(messages) > 1 and messages[0].role == "assistant"
        return Record(dialogue(messages[1:] if cut else messages))


def _several(value: Any) -> list[Any]:
    """No, one or several of something."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


class OpenAI(RowReader):
    """Rows of `messages`, whose content is text or a list of `text` and `image_url` parts; nothing is fetched."""

    def read(self, index: int) -> Record:
        return Record(dialogue(self.messages(take(self.rows[index], "messages", list))))

    def messages(self, given: list[Any]) -> list[Message]:
        """Messages, whoever speaks."""
        messages = []
        for message in given:
            content = checked(message, dict, "a message").get("content")
            said = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = tuple(map(self.part, checked(said, list, "content")))
            messages.append(Message(role_of(message.get("role"), OPENAI_ROLES), parts))
        return messages

    def part(self, part: Any) -> Part:
        """A part of a message."""
        kind = take(part, "type", str)
        if kind == "text":
            return Text(text(part.get("text")))
        if kind == "image_url":
            where = part.get("image_url")
            return self.picture(where.get("url") if isinstance(where, dict) else where)
        raise DataError(f"a part of type {kind!r:.40}, expected text or image_url")
