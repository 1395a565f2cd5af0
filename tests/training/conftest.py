"""A recipe so small that a step takes milliseconds, and folders in which its runs find their tokenizer."""

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sightline.core.errors import SightlineError
from sightline.data.images import Square
from sightline.encoders.vit import ViTConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.tokenizer import Tokenizer, train_tokenizer
from sightline.model import VLMConfig
from sightline.training.preferences import PairsSource
from sightline.training.recipe import Recipe, Stage
from sightline.training.run import CONTROLS
from sightline.training.sources import ScenesSource

TEXTS = ["how many red circles are there? yes no one two where is the large blue square? describe the picture"] * 30


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes, the control tokens and a few words."""
    return train_tokenizer(TEXTS, 480, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """All four kinds of stage on a model of some 30,000 parameters, in float32."""
    model = VLMConfig(
        image=ViTConfig(image_size=32, patch_size=16, width=16, depth=1, heads=2, mlp=32),
        fusion=ProjectorConfig(inputs=16, width=24),
        decoder=DecoderConfig(vocab_size=480, width=24, depth=1, heads=2, mlp=48, tied=True, max_length=512),
    )
    sources = {
        "pictures": ScenesSource(kind="pictures", first=2, grown=10_000, patch=64),
        "text": ScenesSource(kind="text", start=1_000_000, turns=1, first=2, grown=10_000),
        "questions": ScenesSource(kind="questions", start=2_000_000, turns=1, first=2, grown=10_000),
        "captions": ScenesSource(kind="captions", start=3_000_000, first=2, grown=10_000),
        "pairs": PairsSource(start=4_000_000, first=2),
    }
    plain = Stage(
        "plain", {"decoder.*": 1e-2}, {"text": 1.0}, steps=6, batch=2, precision="fp32", warmup=2, save_every=2
    )
    stages = (
        replace(
            plain,
            name="encoder",
            learn={"encoder.*": 1e-2},
            data={"pictures": 1.0},
            objective={"dense": 1.0, "siglip": 0.3},
        ),
        replace(plain, name="language", optimizer="muon"),
        replace(plain, name="align", learn={"fusion.*": 1e-2}, data={"captions": 1.0}),
        replace(
            plain,
            name="instruct",
            learn={"fusion.*": 1e-2, "decoder.*": 1e-3},
            data={"questions": 3.0, "captions": 1.0},
        ),
    )
    return Recipe("tiny", model, Square(32), sources, stages, vocabulary=480, max_length=512)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A run's folder."""
    return with_tokenizer(tmp_path / "run", tokenizer)


@pytest.fixture
def fresh(tmp_path: Path, tokenizer: Tokenizer) -> Callable[[str], Path]:
    """Further folders for runs, by name."""
    return lambda name: with_tokenizer(tmp_path / name, tokenizer)


def with_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """disk(size): an empty file system of that many bytes."""
    mounted: list[Path] = []

    def make(size: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system cannot be mounted here")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def alone() -> Callable[..., Recipe]:
    """alone(recipe, name, **changes): the recipe with only that stage, changed; it starts from random weights."""

    def make(recipe: Recipe, name: str, **changes: object) -> Recipe:
        return replace(recipe, stages=(replace(recipe.stages[recipe.stage(name)], **changes),))

    return make


@pytest.fixture(scope="session")
def launch() -> Callable[..., list[int]]:
    """launch(work, count): ids of so many forks of this process that do `work` as one run, as under torchrun."""

    def start(work: Callable[[], None], count: int = 2) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
                one_of_them(work)
            children.append(child)
        return children

    return start


@pytest.fixture
def pretended() -> Callable[..., None]:
    """pretended(work, rank, count): do `work` as one of so many processes of which there are no others.

    In a fork: torch remembers meshes and who is where in them, and would take a later one of that size for the same.
    """

    def start(work: Callable[[], None], rank: int, count: int) -> None:
        import torch
        from torch.testing._internal.distributed.fake_pg import FakeStore

        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.distributed.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
                work()
                code = 0
            except BaseException:
                traceback.print_exc(file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    return start


def one_of_them(work: Callable[[], None]) -> None:
    """Do some work as a process of its own and end; nothing of the test runner may run twice."""
    from sightline.training import distributed

    code = 1
    try:
        with distributed.joined():
            work()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except SightlineError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)
