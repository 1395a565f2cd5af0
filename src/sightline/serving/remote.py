"""Models behind other people's HTTP APIs, asked with the same verbs: `openai:NAME` and `gemini:NAME`.

- OpenAI's chat completions, which many other servers speak too; key OPENAI_API_KEY, address OPENAI_BASE_URL.
- Gemini's generateContent; key GEMINI_API_KEY, address GEMINI_BASE_URL.

Nothing is sent anywhere unless a model is named this way. A key goes to its own address only: redirects are not
followed, and without TLS only this machine is spoken to.
"""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from ..core.config import nearest
from ..core.errors import ConfigError, InputError, RemoteError, SightlineError
from ..core.sequence import Audio, Conversation, Image, Message, Piece, Region, Text, Video
from .sampling import Sampling
from .talker import Answer, Stream, Talker

Json = dict[str, Any]

TIMEOUT = 120.0  # seconds without a byte
TRIES = 5  # of a request that was refused for a while: status 429 or 5xx
AT_ONCE = 8  # requests of a batch on their way together
LARGEST = 4_000_000  # bytes of a lossless picture; beyond, it is sent as a JPEG
LONGEST_LINE = 10_000_000  # bytes of one event of a stream


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error like any other: whoever answers elsewhere must not be handed the key."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class Remote(Talker):
    """A model behind an API; what it knows of a protocol is how to say a conversation and how to read events."""

    provider: str
    key_name: str
    base_name: str
    base_default: str

    def __init__(self, model: str, wait: Callable[[float], None] = time.sleep) -> None:
        self.model, self.name, self._wait = model, f"{self.provider}:{model}", wait
        self.key = os.environ.get(self.key_name, "")
        if not self.key:
            raise ConfigError(f"{self.name} needs a key, expected it in the environment variable {self.key_name}")
        self.base = os.environ.get(self.base_name, self.base_default).rstrip("/")
        found = urlsplit(self.base)
        local = found.hostname in ("localhost", "127.0.0.1", "::1")
        if not found.hostname or found.scheme not in ("https", *(["http"] if local else [])):
            raise ConfigError(f"{self.base_name} is {self.base!r}, expected an address that begins with https://")

    @abstractmethod
    def request(self, talk: Conversation, sampling: Sampling) -> tuple[str, Json]:
        """The path below the base address and the body that ask for one streamed answer."""

    @abstractmethod
    def headers(self) -> dict[str, str]:
        """How the key is shown."""

    @abstractmethod
    def read(self, event: Json) -> tuple[str, dict[str, int]]:
        """What one event of the stream adds: text, and usage where it tells it. RemoteError for a refusal."""

    # --------------------------------------------------------------------------------------------------------- verbs

    def answer(
        self, talks: Sequence[Conversation], sampling: Sampling | Sequence[Sampling] = Sampling()
    ) -> list[Answer]:
        """One answer per conversation, in order; several are asked for at once, each one's failure is its own."""
        each = [sampling] * len(talks) if isinstance(sampling, Sampling) else list(sampling)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._answered, talks, each))

    def stream_chat(self, talk: Conversation, **sampling: Any) -> Stream:
        return Stream(self._pieces(talk, Sampling(**sampling)))

    def _answered(self, talk: Conversation, sampling: Sampling) -> Answer:
        try:
            *_, last = self._pieces(talk, sampling)
        except SightlineError as error:
            return Answer(error=error)
        assert isinstance(last, Answer)
        return last

    def _pieces(self, talk: Conversation, sampling: Sampling) -> Iterator[str | Answer]:
        """Pieces of text as they come, then the whole answer."""
        began, first = time.perf_counter(), 0.0
        text, usage = "", {"prompt_tokens": 0, "completion_tokens": 0}
        with self._asked(*self.request(talk, sampling)) as response:
            for event in _events(response, self.name):
                piece, told = self.read(event)
                usage |= told
                if piece:
                    first = first or time.perf_counter() - began
                    text += piece
                    yield piece
        total = time.perf_counter() - began
        timing = {"first_token": round(first or total, 4), "total": round(total, 4)}
        yield Answer(text.strip(), confidence=None, usage=usage, timing=timing)

    # ------------------------------------------------------------------------------------------------------ the wire

    @contextmanager
    def _asked(self, path: str, body: Json) -> Iterator[http.client.HTTPResponse]:
        """The open response to a request; RemoteError with the service's own words where there is none."""
        try:
            with self._opened(path, body) as response:
                yield response
        except (OSError, http.client.HTTPException) as error:  # also what breaks off in the middle
            reason = getattr(error, "reason", None) or error
            raise RemoteError(f"{self.name}: {urlsplit(self.base).hostname} could not be reached ({reason})") from None

    def _opened(self, path: str, body: Json) -> http.client.HTTPResponse:
        """Ask again after a while where the service is busy, and without a setting that this model does not take."""
        for left in reversed(range(TRIES)):
            data = json.dumps(body).encode()
            request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"})
            for name, value in self.headers().items():
                request.add_unredirected_header(name, value)
            try:
                response: http.client.HTTPResponse = _OPENER.open(request, timeout=TIMEOUT)
                return response
            except urllib.error.HTTPError as error:
                with error:
                    said = _error(error.read(100_000))
                    busy = error.code == 429 or error.code >= 500
                    refused = said.get("param") if error.code == 400 else None
                    if left and refused in self.optional and body.pop(refused, None) is not None:
                        continue
                    if not left or not busy:
                        words = " ".join(str(said.get("message") or error.reason).split())[:300]
                        raise RemoteError(f"{self.name}: status {error.code}, {words}") from None
                    self._wait(_patience(error.headers.get("Retry-After"), TRIES - left))
        raise AssertionError("the last try returns or raises")

    optional: tuple[str, ...] = ()  # settings of a request that some models refuse


def _error(data: bytes) -> Json:
    """The `error` object of a response, empty where there is none."""
    try:
        found = json.loads(data)
        found = found[0] if isinstance(found, list) else found
        return dict(found["error"])
    except (ValueError, LookupError, TypeError):
        return {}


def _patience(asked: str | None, tried: int) -> float:
    """Seconds to wait before the next try: what the service asks for, at most a minute, or twice as long each time."""
    try:
        return min(60.0, max(0.0, float(asked or "")))
    except ValueError:
        return 0.5 * 2.0**tried


def _events(response: http.client.HTTPResponse, name: str) -> Iterator[Json]:
    """The JSON of every `data:` line of a stream of server-sent events, up to its end."""
    while line := response.readline(LONGEST_LINE):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise RemoteError(f"{name}: sent {data[:60]!r}, expected JSON") from None
        if not isinstance(event, dict):
            raise RemoteError(f"{name}: sent a {type(event).__name__}, expected an object")
        if "error" in event:
            raise RemoteError(f"{name}: {' '.join(str(_error(data).get('message') or event['error']).split())[:300]}")
        yield event


def _encoded(image: Image) -> tuple[str, str]:
    """A picture's media type and its bytes in base64."""
    for kind, settings in (("PNG", {}), ("JPEG", {"quality": 95})):
        out = io.BytesIO()
        image.picture.convert("RGB").save(out, kind, **settings)
        if out.tell() <= LARGEST:
            break
    return f"image/{kind.lower()}", base64.b64encode(out.getvalue()).decode()


def _parts(message: Message) -> Iterator[str | Image]:
    """A message's words and pictures, a video as its frames."""
    for part in message.parts:
        if isinstance(part, Text):
            yield part.text
        elif isinstance(part, Image):
            yield part
        elif isinstance(part, Video):
            yield from part.frames
        elif isinstance(part, Region | Piece):
            raise InputError("a place in a picture cannot be said to a model behind an API, expected words")
        elif isinstance(part, Audio):
            raise InputError("sound is not sent to a model behind an API, expected words and pictures")


# --------------------------------------------------------------------------------------------------------- protocols


class OpenAI(Remote):
    """Chat completions as OpenAI (GPT-4V and later), vLLM, SGLang, llama.cpp and others serve them."""

    provider, key_name = "openai", "OPENAI_API_KEY"
    base_name, base_default = "OPENAI_BASE_URL", "https://api.openai.com/v1"
    optional = ("temperature", "top_p", "seed", "stop", "stream_options")

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def request(self, talk: Conversation, sampling: Sampling) -> tuple[str, Json]:
        # OpenAI's own models refuse the older name, other servers may know no other
        longest = "max_completion_tokens" if self.base == self.base_default else "max_tokens"
        body: Json = {
            "model": self.model,
            "messages": [{"role": m.role, "content": [_openai_part(part) for part in _parts(m)]} for m in talk],
            longest: sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        return "/chat/completions", body

    def read(self, event: Json) -> tuple[str, dict[str, int]]:
        text = ""
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if refusal := delta.get("refusal"):
                raise RemoteError(f"{self.name}: refused to answer, {refusal}")
            text += delta.get("content") or ""
        usage = event.get("usage") or {}
        return text, {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens") if name in usage}


def _openai_part(part: str | Image) -> Json:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind, data = _encoded(part)
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


class Gemini(Remote):
    """Gemini's own protocol, generateContent."""

    provider, key_name = "gemini", "GEMINI_API_KEY"
    base_name, base_default = "GEMINI_BASE_URL", "https://generativelanguage.googleapis.com/v1beta"

    def headers(self) -> dict[str, str]:
        return {"x-goog-api-key": self.key}

    def request(self, talk: Conversation, sampling: Sampling) -> tuple[str, Json]:
        settings: Json = {
            "maxOutputTokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "topP": sampling.top_p,
            "seed": sampling.seed,
        }
        if sampling.stop:
            settings["stopSequences"] = list(sampling.stop)
        system = [{"text": m.text} for m in talk if m.role == "system"]
        contents = [
            {"role": "user" if m.role == "user" else "model", "parts": [_gemini_part(part) for part in _parts(m)]}
            for m in talk
            if m.role != "system"
        ]
        body: Json = {"contents": contents, "generationConfig": settings}
        if system:
            body["systemInstruction"] = {"parts": system}
        return f"/models/{self.model}:streamGenerateContent?alt=sse", body

    def read(self, event: Json) -> tuple[str, dict[str, int]]:
        if reason := (event.get("promptFeedback") or {}).get("blockReason"):
            raise RemoteError(f"{self.name}: refused the question ({reason})")
        text = ""
        for candidate in event.get("candidates") or ():
            if (reason := candidate.get("finishReason")) not in (None, "STOP", "MAX_TOKENS"):
                raise RemoteError(f"{self.name}: refused to answer ({reason})")
            parts = (candidate.get("content") or {}).get("parts") or ()
            text += "".join(part.get("text", "") for part in parts if not part.get("thought"))
        told = event.get("usageMetadata") or {}
        names = {"prompt_tokens": "promptTokenCount", "completion_tokens": "candidatesTokenCount"}
        usage = {ours: int(told[theirs]) for ours, theirs in names.items() if theirs in told}
        for detail in told.get("promptTokensDetails") or ():
            if detail.get("modality") == "IMAGE":
                usage["image_tokens"] = int(detail.get("tokenCount", 0))
        return text, usage


def _gemini_part(part: str | Image) -> Json:
    if isinstance(part, str):
        return {"text": part}
    kind, data = _encoded(part)
    return {"inlineData": {"mimeType": kind, "data": data}}


PROVIDERS: dict[str, type[Remote]] = {kind.provider: kind for kind in (OpenAI, Gemini)}


def is_remote(name: object) -> bool:
    """Whether a model's name says that it is behind somebody's API: `openai:gpt-4o`."""
    return isinstance(name, str) and name.partition(":")[0] in PROVIDERS and ":" in name


def reach(name: str) -> Remote:
    """A model behind an API, as `openai:NAME` or `gemini:NAME`; ConfigError without its key in the environment."""
    provider, _, model = name.partition(":")
    if provider not in PROVIDERS:
        raise ConfigError(f"unknown API {provider!r}{nearest(provider, PROVIDERS)}")
    if not model or not all(c.isalnum() or c in "-._/:" for c in model) or ".." in model:
        raise ConfigError(f"{name!r} names no model, expected one such as {provider}:NAME")
    return PROVIDERS[provider](model)
