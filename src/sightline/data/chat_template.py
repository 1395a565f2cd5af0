"""Chat templates that come with a checkpoint, run in a sandbox and read as segments.

A published folder may bring its template as a Jinja program. It is run over stand-ins for what people wrote, whose
words are put in afterwards, as words: nothing that anybody types can become a control token or a part of the program.
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..core.errors import CheckpointError, InputError
from ..core.sequence import Audio, Conversation, Image, Message, Part, Text, Video
from .template import Control, End, Films, Segment, Writer, turns

# private characters, which published templates have no use for
_OPEN, _CLOSE, _LEARN, _STOP = "\ue000", "\ue001", "\ue002", "\ue003"
_MARKS = re.compile(f"{_OPEN}(\\d+){_CLOSE}|([{_LEARN}{_STOP}])")


class ChatTemplate:
    """A template by its Jinja source.

    controls: names that are control tokens where the template itself writes them; image: the one that stands for a
    picture; bos begins a conversation whose template does not write it; eos ends an answer. video: the token that
    stands for a whole film; films: names that stand for one whose frames are written in a way of its family; without
    either each frame is a picture. begins: whether the tokenizer puts bos before a text.
    """

    def __init__(
        self,
        source: str,
        controls: Sequence[str],
        image: str,
        bos: str = "",
        eos: str = "",
        video: str | None = None,
        films: Films | None = None,
        begins: bool = True,
    ) -> None:
        self.controls, self.image, self.video, self.films = tuple(controls), image, video, films or {}
        self.bos, self.eos, self.begins = bos, eos, begins
        self.in_parts = re.search(r"""\[['"]type['"]\]|\.type\b|['"]type['"]""", source) is not None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation])
        environment.globals["raise_exception"] = _refuse
        try:
            self.program = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template cannot be read: {error}") from None
        names = sorted((name for name in {*self.controls, *self.films} if name), key=len, reverse=True)
        self.names = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def __call__(self, conversation: Conversation) -> list[Segment]:
        """The segments of a conversation, asking for an answer where the user spoke last."""
        talk = turns(conversation)
        said: list[Part] = []
        messages = [self._message(message, said) for message in conversation]
        films = [len(part.frames) for message in conversation for part in message.parts if isinstance(part, Video)]
        try:
            text = self.program.render(
                messages=messages,
                add_generation_prompt=talk[-1].role == "user",
                bos_token=self.bos,
                eos_token=self.eos,
            )
        except InputError:
            raise
        except Exception as error:  # a program of others may fail in any way; the sandbox refuses in several
            raise CheckpointError(f"the chat template fails: {error}") from None
        found = self._segments(text, said, films)
        starts = isinstance(found[0], Control) and found[0].name == self.bos if found else False
        return [Control(self.bos), *found] if self.bos and self.begins and not starts else found

    def _message(self, message: Message, said: list[Part]) -> dict[str, Any]:
        """A message as templates know it, its words and places replaced by stand-ins."""
        parts: list[dict[str, str]] = []
        last: Part | None = None
        for part in message.parts:
            if isinstance(part, Audio):
                raise InputError("this model's chat template has no form for a sound")
            if isinstance(part, Video) and (self.video or self.films):
                parts.append({"type": "video"})
            elif isinstance(part, (Image, Video)):
                parts += [{"type": "image"}] * (len(part.frames) if isinstance(part, Video) else 1)
            else:
                said.append(part)
                text = f"{_OPEN}{len(said) - 1}{_CLOSE}"
                if parts and parts[-1]["type"] == "text" and not (isinstance(part, Text) and isinstance(last, Text)):
                    parts[-1] = {"type": "text", "text": parts[-1]["text"] + text}  # a place is within what is said
                else:
                    parts.append({"type": "text", "text": text})
            last = part
        if self.in_parts:
            return {"role": message.role, "content": parts}
        if any(part["type"] != "text" for part in parts):
            raise InputError("this model's chat template has no place for pictures")
        return {"role": message.role, "content": "".join(part["text"] for part in parts)}

    def _segments(self, text: str, said: list[Part], films: list[int]) -> list[Segment]:
        out, lengths = Writer(), iter(films)
        learned, start = False, 0
        for mark in [*_MARKS.finditer(text), None]:
            stop = len(text) if mark is None else mark.start()
            place = start
            for name in self.names.finditer(text, start, stop):
                out.words(text[place : name.start()], learned)
                place = name.end()
                if name[0] in (self.image, self.video):
                    out.image()
                elif name[0] in self.films:
                    self.films[name[0]](out, next(lengths, 0))
                elif name[0] == self.eos and out.segments and getattr(out.segments[-1], "learned", False):
                    out.segments.append(End(name[0]))
                else:
                    out.control(name[0])
            out.words(text[place:stop], learned)
            if mark is not None:
                start = mark.end()
                if mark[1] is not None:
                    out.parts(Message("user", (said[int(mark[1])],)), learned)
                else:
                    learned = mark[2] == _LEARN
        return out.segments


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`, around what the model is to write."""

    tags = {"generation"}  # noqa: RUF012 # the name and kind that Jinja asks for

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_LEARN}{caller()}{_STOP}"


def _refuse(message: str) -> str:
    """What templates call where a conversation is not one they know."""
    raise InputError(f"the chat template refuses: {message}")
