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
