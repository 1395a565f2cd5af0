"""How a family lays out a conversation: control tokens, words and image places, as values instead of one long string.

Words of a template and of a user that stand side by side are tokenised together, as the published processors do;
control tokens and image slots are never text, so nobody can type them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..core.errors import InputError
from ..core.geometry import Mask
from ..core.sequence import Conversation, Image, Message, Piece, Region, Text, Video, images_of
from ..grounding.codecs import Place


@dataclass(frozen=True)
class Control:
    """A control token by its name."""

    name: str


@dataclass(frozen=True)
class Words:
    """Plain text; `learned` when the model is to write it."""

    text: str
    learned: bool = False


@dataclass(frozen=True)
class Places:
    """Regions that the model is to write, or that a user refers to, of one image of the conversation."""

    places: tuple[Place | Mask, ...]
    image: int
    learned: bool = False


@dataclass(frozen=True)
class Slot:
    """Where the tokens of one image go, or of one film where these have a place of their own."""

    index: int


@dataclass(frozen=True)
class Sound:
    """Where the tokens of one sound go."""

    index: int


@dataclass(frozen=True)
class End:
    """The token that ends an answer; learned."""

    name: str


Segment = Control | Words | Places | Slot | Sound | End
Template = Callable[[Conversation], list[Segment]]


@dataclass
class Writer:
    """Segments in the making, images and sounds counted as they come; hears: whether a sound has a place in them."""

    segments: list[Segment] = field(default_factory=list)
    images: int = 0
    sounds: int = 0
    hears: bool = False

    def control(self, name: str) -> None:
        self.segments.append(Control(name))

    def words(self, text: str, learned: bool = False) -> None:
        last = self.segments[-1] if self.segments else None
        if isinstance(last, Words) and last.learned == learned:
            self.segments[-1] = Words(last.text + text, learned)
        elif text:
            self.segments.append(Words(text, learned))

    def image(self) -> None:
        self.segments.append(Slot(self.images))
        self.images += 1

    def sound(self) -> None:
        self.segments.append(Sound(self.sounds))
        self.sounds += 1

    def shown(self, message: Message) -> Message:
        """Write the pictures of a message, a film as so many, and hand back the rest of it."""
        for _ in images_of((message,)):
            self.image()
        return Message(message.role, tuple(part for part in message.parts if not isinstance(part, (Image, Video))))

    def parts(self, message: Message, learned: bool = False, before: str = "") -> None:
        """All parts of a message; `before` precedes its first words."""
        for part in message.parts:
            if isinstance(part, Text):
                self.words(before + part.text, learned)
                before = ""
            elif isinstance(part, Image):
                self.image()
            elif isinstance(part, Video):
                for _ in part.frames:
                    self.image()
            elif isinstance(part, Region):
                last = self.segments[-1] if self.segments else None
                if isinstance(last, Places) and last.image == part.image and last.learned == learned:
                    joined = Places((*last.places, part.shape), part.image, learned)
                    self.segments[-1] = joined
                else:
                    self.segments.append(Places((part.shape,), part.image, learned))
            elif isinstance(part, Piece):
                self.control(part.text) if part.control else self.words(part.text, learned)
            elif self.hears:
                self.sound()
            else:
                raise InputError(f"this model reads text and images, not {type(part).__name__.lower()}")


Films = Mapping[str, Callable[[Writer, int], None]]  # how so many frames are written, by the name of a film


def turns(conversation: Conversation) -> Sequence[Message]:
    """The messages after checking that user and assistant alternate and a user begins."""
    talk = [message for message in conversation if message.role != "system"]
    for i, message in enumerate(talk):
        expected = "assistant" if i % 2 else "user"
        if message.role != expected:
            raise InputError(f"message {i + 1} is from the {message.role}, expected the {expected}")
    if not talk:
        raise InputError("the conversation is empty, expected a message from the user")
    return talk


def spoken(conversation: Conversation) -> Sequence[Message]:
    """The same of a form that has no place for a system message, which is refused."""
    talk = turns(conversation)
    if len(talk) < len(conversation):
        raise InputError("this model's form of a conversation has no place for a system message")
    return talk


def sightline_template(conversation: Conversation) -> list[Segment]:
    """This project's own: `<bos>`, the images, then `<user>` question `<assistant>` answer `<eos>` in turn.

    Images come first wherever they stand in the conversation, so that several questions share one prefix. An answer's
    words start with a space, which gives them the same tokens as the words of a question.
    """
    out = Writer()
    out.control("<bos>")
    talk = turns(conversation)
    said = [out.shown(message) for message in talk]
    for message in conversation:
        if message.role == "system":
            out.parts(message)
    for words in said:
        out.control("<user>" if words.role == "user" else "<assistant>")
        if words.role == "user":
            out.parts(words)
        else:
            out.parts(words, learned=True, before=" ")
            out.segments.append(End("<eos>"))
    if talk[-1].role == "user":
        out.control("<assistant>")
    return out.segments


def interleaved_template(conversation: Conversation) -> list[Segment]:
    """All that is said, shown or heard where it stands, each frame of a film after its time.

    `<bos>`, then `<user>` question `<assistant>` answer `<eos>` in turn.
    """
    out = Writer(hears=True)
    out.control("<bos>")
    talk = turns(conversation)
    for message in conversation:
        if message.role == "system":
            out.parts(message)
    for message in talk:
        user = message.role == "user"
        out.control("<user>" if user else "<assistant>")
        for part in message.parts:
            if isinstance(part, Video):
                for frame, time in zip(part.frames, part.times, strict=True):
                    out.words(f" {clock(time)} ")
                    out.parts(Message("user", (frame,)))
            else:
                out.parts(Message(message.role, (part,)), learned=not user)
        if not user:
            out.segments.append(End("<eos>"))
    if talk[-1].role == "user":
        out.control("<assistant>")
    return out.segments


def clock(seconds: float) -> str:
    """A time in minutes and seconds to the tenth: 01:05.5."""
    tenths = round(seconds * 10)
    return f"{tenths // 600:02d}:{tenths % 600 // 10:02d}.{tenths % 10}"


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def vicuna_template(system: str = VICUNA_SYSTEM, newline: bool = True) -> Template:
    """LLaVA's conversation format "v1" (haotian-liu/LLaVA, llava/conversation.py); llava-hf's has no system text."""

    def template(conversation: Conversation) -> list[Segment]:
        out = Writer()
        out.control("<s>")
        said = "".join(message.text + " " for message in conversation if message.role == "system") or system
        out.words(said)
        talk = turns(conversation)
        for message in talk:
            if message.role == "user":
                out.words("USER: ")
                _user(out, message, newline)
                out.words(" ASSISTANT:")
            else:
                out.parts(message, learned=True, before=" ")
                out.segments.append(End("</s>"))
        return out.segments

    return template


def _user(out: Writer, message: Message, newline: bool) -> None:
    """A user's parts; an image is followed by a line break before the words, as in LLaVA's data."""
    parts = message.parts
    for i, part in enumerate(parts):
        out.parts(Message("user", (part,)))
        if newline and isinstance(part, Image) and i + 1 < len(parts):
            out.words("\n")


def chatml(user: Callable[[Writer, Message], None], system: str = "", after: str = "\n", bos: str = "") -> Template:
    """Turns between `<|im_start|>` and `<|im_end|>`, with the text `after` each; `user` writes what a user says.

    system: what is said before a conversation that begins without it; nothing where it is empty.
    """

    def begin(out: Writer, role: str) -> None:
        out.control("<|im_start|>")
        out.words(f"{role}\n")

    def end(out: Writer, segment: Segment) -> None:
        out.segments.append(segment)
        out.words(after)

    def template(conversation: Conversation) -> list[Segment]:
        out, stop = Writer(), "<|im_end|>"
        if bos:
            out.control(bos)
        if said := "".join(message.text for message in conversation if message.role == "system") or system:
            begin(out, "system")
            out.words(said)
            end(out, Control(stop))
        talk = turns(conversation)
        for message in talk:
            begin(out, message.role)
            if message.role == "user":
                user(out, message)
                end(out, Control(stop))
            else:
                out.parts(message, learned=True)
                end(out, End(stop))
        if talk[-1].role == "user":
            begin(out, "assistant")
        return out.segments

    return template


def headed(begin: str, end: str, stop: str) -> Template:
    """Llama 3's and 4's: who speaks stands between two tokens, what is said ends with a third."""

    def head(out: Writer, role: str) -> None:
        out.control(begin)
        out.words(role)
        out.control(end)
        out.words("\n\n")

    def template(conversation: Conversation) -> list[Segment]:
        out, talk = Writer(), turns(conversation)
        out.control("<|begin_of_text|>")
        for message in conversation:
            answer = message.role == "assistant"
            head(out, message.role)
            out.parts(message, learned=answer)
            out.segments.append(End(stop) if answer else Control(stop))
        if talk[-1].role == "user":
            head(out, "assistant")
        return out.segments

    return template


def llava_plain_template(conversation: Conversation) -> list[Segment]:
    """LLaVA's first stage: the image, then its caption and a line break; the caption is learned."""
    out = Writer()
    out.control("<s>")
    for message in spoken(conversation):
        if message.role == "user":
            out.shown(message)
        else:
            out.parts(message, learned=True)
            out.words("\n", learned=True)
    return out.segments


TEMPLATES: dict[str, Template] = {
    "sightline": sightline_template,
    "interleaved": interleaved_template,
    "llava-v1": vicuna_template(),
    "llava-hf": vicuna_template(system=""),
    "llava-plain": llava_plain_template,
}
