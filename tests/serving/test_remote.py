"""Models behind APIs, against a server on this machine that speaks their protocols and remembers what it was sent."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner

import sightline
from sightline import Audio, Box, ConfigError, Frame, Image, InputError, Message, Region, RemoteError, Text, Video
from sightline.cli import app
from sightline.serving.remote import LARGEST, Gemini, OpenAI, Remote, is_remote

RED = Image(PIL.Image.new("RGB", (6, 4), (255, 0, 0)))
BLUE = Image(PIL.Image.new("RGB", (3, 5), (0, 0, 255)))
TALK = (
    Message("system", (Text("Be brief."),)),
    Message("user", (RED, Text("What color?"))),
    Message("assistant", (Text("red"),)),
    Message("user", (Text("And here?"), Video((BLUE, RED), (0.0, 1.0)))),
)
OPENAI = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": " blue"}}]},
    {"choices": [{"delta": {"content": " and red "}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 4, "total_tokens": 34}},
]
GEMINI = [
    {"candidates": [{"content": {"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": " blue"}]}}]},
    {
        "candidates": [{"content": {"parts": [{"text": " and red "}]}, "finishReason": "STOP"}],
        "usageMetadata": {
            "promptTokenCount": 30,
            "candidatesTokenCount": 4,
            "promptTokensDetails": [
                {"modality": "TEXT", "tokenCount": 9},
                {"modality": "IMAGE", "tokenCount": 21},
            ],
        },
    },
]


@dataclass
class Service:
    """What the server answers next, (status, headers, body), and what it was asked."""

    url: str = ""
    replies: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    seen: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def events(self, events: list[Any], end: bytes = b"data: [DONE]\n\n", times: int = 1) -> None:
        body = b": a comment\n\n" + b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + end
        self.replies += [(200, {"Content-Type": "text/event-stream"}, body)] * times

    def refuses(self, status: int, error: Any = None, **headers: str) -> None:
        self.replies.append((status, headers, json.dumps(error).encode()))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    found = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with found.lock:
                found.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                status, headers, data = found.replies.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    for name in ("OPENAI", "GEMINI"):
        monkeypatch.setenv(f"{name}_API_KEY", f"{name} key")
        monkeypatch.setenv(f"{name}_BASE_URL", found.url + "/v1/")
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits() -> list[float]:
    return []


def unpacked(data: str) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Size and first pixel of a picture in base64."""
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(data)))
    return picture.size, picture.getpixel((0, 0))  # type: ignore[return-value]


def test_a_conversation_in_openai_s_protocol(service: Service) -> None:
    service.events(OPENAI)
    model = sightline.reach("openai:gpt-4o")
    answer = model.chat(TALK, max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("\n",))
    assert (answer.text, answer.confidence) == ("blue and red", None)
    assert answer.usage == {"prompt_tokens": 30, "completion_tokens": 4}
    assert answer.cost_line().startswith("30 tokens read, 4 written, ")
    ((path, headers, body),) = service.seen
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer OPENAI key"
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("gpt-4o", 7, 0.5, 0.9)
    assert (body["seed"], body["stop"], body["stream"]) == (3, ["\n"], True)
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    first, last = body["messages"][1]["content"], body["messages"][3]["content"]
    assert [part["type"] for part in (*first, *last)] == ["image_url", "text", "text", "image_url", "image_url"]
    head, data = first[0]["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert unpacked(data) == ((6, 4), (255, 0, 0))
    assert unpacked(last[1]["image_url"]["url"].split(",")[1]) == ((3, 5), (0, 0, 255))


def test_a_conversation_in_gemini_s_protocol(service: Service) -> None:
    service.events(GEMINI, end=b"")
    answer = sightline.reach("gemini:gemini-1.5-pro").chat(TALK, max_new_tokens=7, stop=("\n",))
    assert answer.text == "blue and red"
    assert answer.usage == {"prompt_tokens": 30, "completion_tokens": 4, "image_tokens": 21}
    ((path, headers, body),) = service.seen
    assert path == "/v1/models/gemini-1.5-pro:streamGenerateContent?alt=sse"
    assert headers["x-goog-api-key"] == "GEMINI key"
    assert body["systemInstruction"] == {"parts": [{"text": "Be brief."}]}
    assert [content["role"] for content in body["contents"]] == ["user", "model", "user"]
    assert body["contents"][0]["parts"][1] == {"text": "What color?"}
    assert body["contents"][0]["parts"][0]["inlineData"]["mimeType"] == "image/png"
    assert unpacked(body["contents"][2]["parts"][1]["inlineData"]["data"]) == ((3, 5), (0, 0, 255))
    assert body["generationConfig"]["maxOutputTokens"] == 7
    assert body["generationConfig"]["stopSequences"] == ["\n"]


@pytest.mark.parametrize("name, events", [("openai:gpt-4o", OPENAI), ("gemini:gemini-1.5-pro", GEMINI)])
def test_the_program_asks_them(service: Service, name: str, events: list[Any], tmp_path: Path) -> None:
    RED.picture.save(tmp_path / "red.png")
    service.events(events, end=b"")
    done = CliRunner().invoke(app, ["ask", str(tmp_path / "red.png"), "What color?", "--model", name])
    assert done.exit_code == 0 and done.stdout.strip() == "blue and red"
    assert "What color?" in json.dumps(service.seen[0][2])
    service.refuses(401, {"error": {"message": "no such key"}})
    done = CliRunner().invoke(app, ["ask", str(tmp_path / "red.png"), "What color?", "--model", name])
    assert done.exit_code != 0 and len(done.stderr.splitlines()) == 1 and "no such key" in done.stderr


@pytest.mark.parametrize("name, events", [("openai:m", OPENAI), ("gemini:m", GEMINI)])
def test_text_comes_in_pieces(service: Service, name: str, events: list[Any]) -> None:
    service.events(events)
    stream = sightline.reach(name).stream(RED, "What?")
    assert [piece for piece in stream if piece.strip() != "hm"] == [" blue", " and red "]
    assert stream.answer.text == "blue and red"
    assert 0 < stream.answer.timing["first_token"] <= stream.answer.timing["total"]


def test_in_a_batch_each_failure_is_its_own(service: Service, waits: list[float]) -> None:
    service.events(OPENAI, times=2)
    sound = (Message("user", (Audio(None, 8000),)),)
    place = (Message("user", (Region(Box(0, 0, 1, 1, Frame(2, 2))),)),)
    found = OpenAI("m", waits.append).answer([TALK, sound, place, TALK])
    assert [answer.text for answer in found] == ["blue and red", "", "", "blue and red"]
    assert isinstance(found[1].error, InputError) and "sound is not sent" in str(found[1].error)
    assert isinstance(found[2].error, InputError) and "expected words" in str(found[2].error)


def test_a_busy_service_is_asked_again_after_what_it_asks_for(service: Service, waits: list[float]) -> None:
    service.refuses(429, {"error": {"message": "slow down"}}, **{"Retry-After": "3"})
    service.refuses(503)
    service.events(OPENAI)
    assert OpenAI("m", waits.append).ask(RED, "What?").text == "blue and red"
    assert waits == [3.0, 2.0]


def test_a_service_that_stays_busy_is_given_up(service: Service, waits: list[float]) -> None:
    for _ in range(5):
        service.refuses(500, [{"error": {"message": "over\nloaded"}}])
    with pytest.raises(RemoteError, match=r"^gemini:m: status 500, over loaded$"):
        Gemini("m", waits.append).ask(RED, "What?")
    assert len(service.seen) == 5
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_a_setting_that_a_model_does_not_take_is_left_out(service: Service, waits: list[float]) -> None:
    service.refuses(400, {"error": {"message": "Unsupported value", "param": "temperature"}})
    service.events(OPENAI)
    assert OpenAI("o3", waits.append).ask(RED, "What?").text == "blue and red"
    assert ["temperature" in body for _, _, body in service.seen] == [True, False]
    service.refuses(400, {"error": {"message": "no such model", "param": "model"}})
    with pytest.raises(RemoteError, match="status 400, no such model"):
        OpenAI("o3", waits.append).ask(RED, "What?")
    assert waits == []


@pytest.mark.parametrize(
    "kind, events, message",
    [
        (OpenAI, [{"choices": [{"delta": {"refusal": "I will not"}}]}], "refused to answer, I will not"),
        (OpenAI, [{"error": {"message": "it broke"}}], "openai:m: it broke"),
        (Gemini, [{"promptFeedback": {"blockReason": "SAFETY"}}], r"refused the question \(SAFETY\)"),
        (Gemini, [{"candidates": [{"finishReason": "RECITATION"}]}], r"refused to answer \(RECITATION\)"),
        (Gemini, [[1]], "sent a list, expected an object"),
    ],
)
def test_a_refusal_is_told(service: Service, kind: type[Remote], events: list[Any], message: str) -> None:
    service.events(events)
    with pytest.raises(RemoteError, match=message):
        kind("m").ask(RED, "What?")


def test_what_is_no_json_is_told(service: Service) -> None:
    service.replies.append((200, {}, b"data: {broken\n\n"))
    with pytest.raises(RemoteError, match=r"sent b'{broken', expected JSON"):
        OpenAI("m").ask(RED, "What?")


def test_a_key_is_not_carried_to_another_address(service: Service) -> None:
    service.refuses(302, Location=service.url + "/elsewhere")
    with pytest.raises(RemoteError, match="status 302"):
        OpenAI("m").ask(RED, "What?")
    assert len(service.seen) == 1


def test_a_service_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(RemoteError, match=r"^openai:m: 127.0.0.1 could not be reached"):
        OpenAI("m").ask(RED, "What?")


def test_a_large_picture_is_sent_as_a_jpeg(service: Service) -> None:
    service.events(OPENAI)
    noise = Image(PIL.Image.effect_noise((1600, 1600), 90).convert("RGB"))
    sightline.reach("openai:m").ask(noise, "What?")
    url = service.seen[0][2]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert len(url) * 3 / 4 < LARGEST


def test_what_names_no_model_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_remote("openai:gpt-4o") and not is_remote("openai") and not is_remote("llava:7b") and not is_remote(None)
    for name, message in (
        ("openia:gpt", "unknown API 'openia'; did you mean 'openai'"),
        ("openai:", "'openai:' names no model"),
        ("gemini:../../files", "names no model"),
        ("gemini:a?key=b", "names no model"),
    ):
        with pytest.raises(ConfigError, match=message):
            sightline.reach(name)
    with pytest.raises(ConfigError, match=r"is behind an API, expected sightline\.reach"):
        sightline.load("openai:gpt-4o")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://example.com/v1")
    with pytest.raises(ConfigError, match="expected an address that begins with https://"):
        sightline.reach("openai:gpt-4o")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="expected it in the environment variable OPENAI_API_KEY"):
        sightline.reach("openai:gpt-4o")
