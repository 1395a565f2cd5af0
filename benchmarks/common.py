"""What benchmarks share: fair timing and dated results."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn so that whatever else the machine does falls on all of them."""
    for run in list(runs.values()) * warm:
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
    return found


def summary(times: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile, in milliseconds."""
    ordered = sorted(times)
    pick = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {
        "median_ms": round(1e3 * statistics.median(ordered), 3),
        "p10_ms": round(1e3 * pick(0.1), 3),
        "p90_ms": round(1e3 * pick(0.9), 3),
    }


def _version(package: str) -> str | None:
    """The version that is installed, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write(name: str, rows: Any) -> Path:
    """Keep a result beside what it was measured with: benchmarks/results/NAME-DATE.json."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    result = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.strip(),
        "machine": model[0].split(":", 1)[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "rows": rows,
    }
    path = HERE / "results" / f"{name}-{result['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    return path
