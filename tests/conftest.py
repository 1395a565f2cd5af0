"""What every test may rely on: one thread per process, no hub, fixed seeds, and real data where it is present."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: test processes share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PARITY = Path(__file__).parent / "parity"

collect_ignore = [] if find_spec("transformers") else [str(PARITY)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in the folder `parity` has that mark."""
    for item in items:
        if item.path.is_relative_to(PARITY):
            item.add_marker(pytest.mark.parity)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder of pictures that others made, with `data.jsonl`; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data" / "real"
    if not (folder / "data.jsonl").is_file():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):  # tests of files that do without it stay quick
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of this project's layout: random weights large enough that pictures change the answers."""
    import torch

    from sightline.data.images import Square
    from sightline.encoders.vit import ViTConfig
    from sightline.fusion.projector import ProjectorConfig
    from sightline.grounding.codecs import LocationTokens
    from sightline.language.decoder import DecoderConfig
    from sightline.language.tokenizer import train_tokenizer
    from sightline.model import VLM, VLMConfig
    from sightline.zoo import own

    controls = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>", *LocationTokens().names)
    texts = ["how many red circles are there? yes no one two where is the blue square?"] * 30
    tokenizer = train_tokenizer(texts, 600, controls, bos="<bos>", eos="<eos>", pad="<pad>")
    config = VLMConfig(
        image=ViTConfig(image_size=64, patch_size=16, width=32, depth=2, heads=2, mlp=64, stem=(8, 16)),
        fusion=ProjectorConfig(inputs=32, width=32),
        decoder=DecoderConfig(
            vocab_size=tokenizer.vocab_size, width=32, depth=2, heads=2, mlp=64, tied=True, max_length=256
        ),
    )
    model = VLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25, generator=generator)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    stages = {"align": ("fusion.*",), "instruct": ("fusion.*", "decoder.*")}
    own.save(model, tokenizer, own.ProcessorConfig(Square(64), max_length=256), folder, stages)
    return folder
