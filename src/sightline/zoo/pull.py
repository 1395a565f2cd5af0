"""Published weights brought from the Hugging Face hub: what is read and nothing else, checked, whole or not at all.

A folder takes its name once every file has the size and the hash that the hub lists for it. What came before a break is
kept beside it, and the next try goes on from there. Pickles and programs are never brought.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..core.config import nearest
from ..core.errors import CapacityError, CheckpointError, ConfigError, InputError, RemoteError
from ..core.folders import user_cache
from .catalogue import REPOSITORY
from .checkpoint import INDEX, PICKLES, WEIGHTS, digest, flush, read_json, write_json
from .families import ROWS
from .family import Row

RECORD = "source.json"  # where a folder was brought from
SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # configurations, templates, tokenizers


class Progress(Protocol):
    """What is told of the bytes that are here so far, of all, and which file they are of."""

    def __call__(self, done: int, total: int, note: str = ..., /) -> None: ...


def pullable(row: Row) -> bool:
    """Whether a row has weights, and its source is a repository of the hub."""
    return row.weights and REPOSITORY.fullmatch(row.source) is not None


def pull(name: str, folder: Path | None = None, progress: Progress | None = None) -> Path:
    """Bring the weights of a published model into a folder, by default one of the cache, and return it.

    Raises ConfigError for a name that is not known or has no weights, RemoteError where the hub refuses or cannot be
    reached, CapacityError for a full disk, CheckpointError for what is not as the hub lists it.
    """
    if name not in ROWS:
        raise ConfigError(f"no published model {name!r}{nearest(name, ROWS)}")
    row = ROWS[name]
    if not pullable(row):
        raise ConfigError(f"{name} has no weights to pull; its source is {row.source}")
    target = folder or user_cache() / name
    revision = row.revision or "main"
    if (target / RECORD).is_file():
        found = read_json(target / RECORD)
        if found.get("repository") == row.source and revision in (found.get("revision"), found.get("commit")):
            return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already, expected a folder to be made")
    hub = Hub(row.source)
    commit, listed = hub.listed(revision)
    part = target.with_name(f".{target.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    done = _Done(progress)
    small = [file for name, file in listed.items() if name.endswith(SMALL)]
    done.total = sum(file.size for file in small)
    for file in small:
        hub.bring(file, commit, part, done)
    weights = _weights(row.source, listed, part)
    done.total += sum(file.size for file in weights)
    here = sum((part / file.name).stat().st_size for file in weights if (part / file.name).exists())
    free = shutil.disk_usage(part).free
    if (wanted := done.total - done.before - here) > free:
        raise CapacityError(f"{name} takes {wanted / 1e9:.1f} GB more, {part.parent} has {free / 1e9:.1f} GB left")
    for file in weights:
        hub.bring(file, commit, part, done)
    shutil.rmtree(part / ".cache", ignore_errors=True)  # where the library keeps what is under way
    files = {file.name: {"bytes": file.size, "hash": file.hash} for file in (*small, *weights)}
    write_json(part / RECORD, {"repository": row.source, "revision": revision, "commit": commit, "files": files})
    flush(part / RECORD)
    if target.exists():
        target.rmdir()  # which is empty
    part.rename(target)
    flush(target.parent)
    return target


def origin(folder: Path) -> str:
    """What a folder that was pulled holds: the repository, its commit, and whether that is pinned here."""
    record = read_json(folder / RECORD)
    repository, revision, commit = (str(record.get(key, "")) for key in ("repository", "revision", "commit"))
    how = f"the newest of {revision}; no commit of it is pinned" if revision == "main" else "pinned"
    return f"{repository} at {commit[:12]} ({how})"


class File:
    """A file as the hub lists it; hash: its sha256, or for a small one the sha1 that git calls it by."""

    def __init__(self, listed: Any) -> None:
        self.name: str = listed.rfilename
        self.size: int = listed.size or 0
        self.hash: str = (listed.lfs.sha256 if listed.lfs else listed.blob_id) or ""

    def matches(self, path: Path) -> bool:
        """Whether this is what is listed."""
        if path.stat().st_size != self.size:
            return False
        if len(self.hash) == 64:
            return digest(path) == self.hash
        return hashlib.sha1(b"blob %d\0" % self.size + path.read_bytes()).hexdigest() == self.hash


class _Done:
    """Bytes so far, told to whoever watches."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.total, self.before = progress, 0, 0

    def at(self, name: str, count: int) -> None:
        if self.progress is not None:
            self.progress(self.before + count, self.total, name)


class Hub:
    """One repository of the hub, by its own client."""

    def __init__(self, repository: str) -> None:
        try:
            import huggingface_hub
        except ImportError:
            raise ConfigError("pull needs huggingface_hub: pip install 'sightline[hub]'") from None
        self.library: Any = huggingface_hub
        self.repository, self.endpoint = repository, os.environ.get("HF_ENDPOINT")

    def listed(self, revision: str) -> tuple[str, dict[str, File]]:
        """The commit that a revision is, and the files of a model in it."""
        api = self.library.HfApi(endpoint=self.endpoint)
        info = self._asked(lambda: api.model_info(self.repository, revision=revision, files_metadata=True))
        files = [File(each) for each in info.siblings or ()]
        return info.sha, {file.name: file for file in sorted(files, key=lambda f: f.name) if _is_part(file.name)}

    def bring(self, file: File, commit: str, folder: Path, done: _Done) -> None:
        """One file, going on where an earlier try stopped; CheckpointError if it is not what was listed."""
        path = folder / file.name
        if not (path.exists() and file.matches(path)):
            download = self.library.hf_hub_download
            more = {"revision": commit, "local_dir": folder, "endpoint": self.endpoint, "tqdm_class": _bar(file, done)}
            self._asked(lambda: download(self.repository, file.name, **more))
            if not file.matches(path):
                path.unlink()
                raise CheckpointError(f"{path}: not what {self.repository} lists under this name; pull it again")
            flush(path)
        done.before += file.size
        done.at(file.name, 0)

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What the client answers, its errors as one line."""
        errors = self.library.errors
        try:
            return ask()
        except errors.GatedRepoError:
            page = f"https://huggingface.co/{self.repository}"
            raise RemoteError(
                f"{self.repository} asks to accept its licence: do so at {page}, then hf auth login"
            ) from None
        except errors.RepositoryNotFoundError:
            raise RemoteError(f"the hub has no repository {self.repository}, or not for you") from None
        except errors.RevisionNotFoundError:
            raise RemoteError(f"{self.repository} has no such revision") from None
        except Exception as error:  # its transports raise classes of their own
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise  # the disk's
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            raise RemoteError(f"{self.repository}: {reason}") from None


def _is_part(name: str) -> bool:
    """Whether a file is of the model itself: those at the top, and a second tokenizer in a folder of its own."""
    folder, _, last = name.rpartition("/")
    return not folder or ("/" not in folder and "tokenizer" in folder and last.endswith(SMALL))


def _bar(file: File, done: _Done) -> type:
    """What the client calls a bar, which draws nothing and tells how far a file is."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **more: Any) -> None:
            more.pop("name", None)
            super().__init__(*args, **{**more, "disable": True})
            self.count = more.get("initial") or 0

        def update(self, n: float | None = 1) -> bool | None:
            self.count += int(n or 0)
            done.at(file.name, self.count)
            return None

    return Bar


def _weights(repository: str, listed: dict[str, File], folder: Path) -> list[File]:
    """The safetensors that are read: those that the index names, or the only one."""
    names = [WEIGHTS]
    if INDEX in listed:
        where = read_json(folder / INDEX).get("weight_map")
        names = sorted({str(name) for name in where.values()}) if isinstance(where, dict) else []
    if names and not (absent := [name for name in names if name not in listed]):
        return [listed[name] for name in names]
    pickles = sorted(name for name in listed if any(Path(name).match(kind) for kind in PICKLES))
    if pickles and INDEX not in listed:
        raise CheckpointError(
            f"{repository} holds no safetensors, only pickles such as {pickles[0]}, which can run code and are not "
            "pulled; convert them with the library that wrote them and give the folder"
        )
    raise CheckpointError(f"{repository} lacks {absent[0] if names else 'a list of its weights'}")
