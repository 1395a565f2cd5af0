"""Weights from a hub: a server on this machine speaks its protocol to the hub's own client."""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sightline.core.errors import CapacityError, CheckpointError, ConfigError, InputError, RemoteError
from sightline.zoo import pull as pulling
from sightline.zoo.catalogue import is_here, listed
from sightline.zoo.checkpoint import write_json, write_pieces
from sightline.zoo.families import ROWS
from sightline.zoo.names import locate
from sightline.zoo.pull import origin, pull
from sightline.zoo.revisions import REVISIONS

pytest.importorskip("huggingface_hub")
COMMIT = "c" * 40
NAME = "llava-1.5-7b"


class Server(BaseHTTPRequestHandler):
    """A repository: files by name, those in `refused` answer with an error, those in `damaged` with other bytes."""

    files: dict[str, bytes]
    refused: set[str]
    damaged: set[str]
    asked: list[str]
    status = 200
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        way = self.path.partition("?")[0]
        if self.status != 200:
            kind = {401: "RepoNotFound", 403: "GatedRepo", 404: "RevisionNotFound"}[self.status]
            return self.reply(self.status, b"", {"X-Error-Code": kind})
        if way.startswith("/api/models/"):
            revision = way.rsplit("/", 1)[1]
            self.asked.append(f"revision {revision}")
            return self.reply(200, json.dumps(self.listing()).encode(), {"Content-Type": "application/json"})
        assert f"/resolve/{COMMIT}/" in way, "a file of no pinned commit"
        name = way.partition(f"/resolve/{COMMIT}/")[2]
        data = self.files[name]
        if name in self.refused:
            return self.reply(400, b"", {})
        if self.command == "GET":
            self.asked.append(name + (f" from {self.headers['Range']}" if "Range" in self.headers else ""))
        digest = hashlib.sha256(data).hexdigest()
        if name in self.damaged:
            data = data[:-1] + b"!"
        more = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]) if "Range" in self.headers else 0
        code = 206 if start else 200
        if start:
            more["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.reply(code, data[start:], more)

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
            if name.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 120}
            siblings.append(entry)
        return {"id": "a/b", "sha": COMMIT, "siblings": siblings}

    def reply(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Iterator[type[Server]]:
    """A hub with one repository: a model of this project in two pieces, and much that must not be brought."""
    from huggingface_hub import constants
    from safetensors.torch import load_file

    source = tmp_path / "source"
    source.mkdir()
    write_pieces(source, load_file(tiny_folder / "model.safetensors"), 70_000)
    card = json.loads((tiny_folder / "config.json").read_text())
    card["weights"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in source.glob("*.safetensors")
    }
    write_json(source / "config.json", card)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor.json"):
        (source / name).write_bytes((tiny_folder / name).read_bytes())
    files = {path.name: path.read_bytes() for path in sorted(source.iterdir())}
    files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "README.md": b"#", "stray.safetensors": b"x"}
    files |= {"qformer_tokenizer/tokenizer.json": b"{}", "onnx/config.json": b"{}", "a/tokenizer/x.json": b"{}"}

    class Here(Server):
        pass

    Here.files, Here.refused, Here.damaged, Here.asked = files, set(), set(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delitem(REVISIONS, ROWS[NAME].source)
    yield Here
    server.shutdown()
    server.server_close()


BROUGHT = {
    "config.json", "model.safetensors.index.json", "processor.json", "tokenizer.json", "tokenizer_config.json",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "qformer_tokenizer/tokenizer.json",
}  # fmt: skip


def test_what_is_read_is_brought_and_found_by_its_name(hub: type[Server], tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    assert not is_here(NAME)
    folder = pull(NAME, progress=lambda *each: told.append(each))  # type: ignore[arg-type]
    assert folder == tmp_path / "cache" / "sightline" / NAME == locate(NAME)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {*BROUGHT, "source.json"}
    assert all((folder / name).read_bytes() == hub.files[name] for name in BROUGHT)
    record = json.loads((folder / "source.json").read_text())
    assert (record["repository"], record["revision"], record["commit"]) == ("llava-hf/llava-1.5-7b-hf", "main", COMMIT)
    assert set(record["files"]) == BROUGHT
    assert told[-1][0] == told[-1][1] == sum(len(hub.files[name]) for name in BROUGHT)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert is_here(NAME) and next(row for row in listed() if row.name == NAME).here
    before = list(hub.asked)
    assert pull(NAME) == folder and hub.asked == before  # nothing is asked for again


def test_a_pulled_model_answers_by_its_name(hub: type[Server]) -> None:
    import PIL.Image

    import sightline

    pull(NAME)
    answer = sightline.load(NAME).ask(PIL.Image.new("RGB", (20, 30)), "how many?", max_new_tokens=3)
    assert answer.usage["image_tokens"] == 16


def test_a_revision_is_pinned(hub: type[Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pull(NAME, tmp_path / "newest")
    newest = f"llava-hf/llava-1.5-7b-hf at {COMMIT[:12]} (the newest of main; no commit of it is pinned)"
    assert origin(tmp_path / "newest") == newest
    monkeypatch.setitem(REVISIONS, ROWS[NAME].source, "abc123")
    hub.asked.clear()
    pull(NAME, tmp_path / "here")
    assert hub.asked[0] == "revision abc123"
    assert json.loads((tmp_path / "here" / "source.json").read_text())["revision"] == "abc123"
    assert origin(tmp_path / "here") == f"llava-hf/llava-1.5-7b-hf at {COMMIT[:12]} (pinned)"
    monkeypatch.setitem(REVISIONS, ROWS[NAME].source, COMMIT)
    before = list(hub.asked)
    assert pull(NAME, tmp_path / "newest") == tmp_path / "newest" and hub.asked == before  # it is that commit already


def test_a_pull_that_was_stopped_goes_on(hub: type[Server], tmp_path: Path) -> None:
    last = "model-00002-of-00002.safetensors"
    hub.refused = {last}
    with pytest.raises(RemoteError, match=r"llava-hf/llava-1\.5-7b-hf: "):
        pull(NAME, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    hub.refused, before = set(), len(hub.asked)
    pull(NAME, tmp_path / "here")
    assert [name for name in hub.asked[before:] if not name.startswith("revision")] == [last]
    assert not list(tmp_path.glob(".here*"))


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "processor.json"])
def test_other_bytes_than_listed_are_refused(hub: type[Server], tmp_path: Path, name: str) -> None:
    hub.damaged = {name}
    with pytest.raises(CheckpointError, match=f"{name}: not what llava-hf/llava-1.5-7b-hf lists under this name"):
        pull(NAME, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    hub.damaged = set()
    assert (pull(NAME, tmp_path / "here") / name).read_bytes() == hub.files[name]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            403,
            "asks to accept its licence: do so at https://huggingface.co/llava-hf/llava-1.5-7b-hf, then hf auth login",
        ),
        (401, "the hub has no repository llava-hf/llava-1.5-7b-hf, or not for you"),
        (404, "llava-hf/llava-1.5-7b-hf has no such revision"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: type[Server], tmp_path: Path, status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(RemoteError) as caught:
        pull(NAME, tmp_path / "here")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_pickles_alone_are_not_brought(hub: type[Server], tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(CheckpointError, match=r"only pickles such as pytorch_model\.bin, which can run code"):
        pull(NAME, tmp_path / "here")
    assert "pytorch_model.bin" not in hub.asked


def test_an_index_of_files_that_are_not_there(hub: type[Server], tmp_path: Path) -> None:
    hub.files = {k: v for k, v in hub.files.items() if not k.startswith("model-00002")}
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        pull(NAME, tmp_path / "here")


def test_what_is_there_is_not_overwritten_and_a_full_disk_is_told(
    hub: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("")
    with pytest.raises(InputError, match="is there already"):
        pull(NAME, tmp_path / "here")
    free = type("Free", (), {"free": 10_000})
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda _: free)
    with pytest.raises(CapacityError, match=r"takes 0\.0 GB more"):
        pull(NAME, tmp_path / "there")


def test_names_without_weights_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no published model 'llava-1\.5-7c'; did you mean 'llava-1\.5-7b'"):
        pull("llava-1.5-7c")
    monkeypatch.setitem(ROWS, NAME, replace(ROWS[NAME], source="arXiv:2305.18565, whose weights were not published"))
    with pytest.raises(ConfigError, match=r"has no weights to pull; its source is arXiv:2305\.18565"):
        pull(NAME)


def test_without_the_client_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pull needs huggingface_hub: pip install 'sightline\[hub\]'"):
        pull(NAME, tmp_path / "here")


def test_without_a_network_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RemoteError) as caught:
        pull(NAME, tmp_path / "here")
    assert "\n" not in str(caught.value)
