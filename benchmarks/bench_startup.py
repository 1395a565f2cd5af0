"""From a cold start to an answer: `sightline ask` and `sightline --help` beside `python -c "import torch"`.

Every round starts one process of each kind, one after the other, so that whatever else the machine does falls on all;
the result is the median over rounds. The claims: an answer takes at most twice as long as importing torch, help under
half a second.

    python benchmarks/bench_startup.py [--rounds 15] [--model FOLDER] [--tokens N] [--out FILE]

Without --model it is the default model. Random weights of the same sizes take the same time for the same number of
tokens, but do not know when to end, so --tokens cuts them off.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "assets" / "shapes.png"
MOST = 2.0  # times importing torch
HELP_SECONDS = 0.5


def seconds(command: list[str]) -> float:
    """Wall time of a process that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def commands(model: str | None, tokens: int) -> dict[str, list[str]]:
    """What is timed, by name."""
    python = sys.executable
    chosen = ["--max-tokens", str(tokens), *(["--model", model] if model else [])]
    return {
        "import torch": [python, "-c", "import torch"],
        "ask": [python, "-m", "sightline", "ask", str(PICTURE), "Where is the red circle?", *chosen],
        "help": [python, "-m", "sightline", "--help"],
        "python": [python, "-c", "pass"],
    }


def measure(rounds: int, model: str | None, tokens: int) -> dict[str, list[float]]:
    """Seconds of every round by name, after one round that only warms the disk's cache."""
    timed = commands(model, tokens)
    for command in timed.values():
        seconds(command)
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, command in timed.items():
            found[name].append(seconds(command))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=64)
    today = datetime.date.today().isoformat()
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"startup-{today}.json")
    options = parser.parse_args()
    times = measure(options.rounds, options.model, options.tokens)
    middle = {name: statistics.median(each) for name, each in times.items()}
    ratio = middle["ask"] / middle["import torch"]
    result = {
        "date": today,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "as many as cores"),
        "python": platform.python_version(),
        "model": Path(options.model).name if options.model else "default",
        "tokens": options.tokens,
        "rounds": options.rounds,
        "median_seconds": {name: round(value, 3) for name, value in middle.items()},
        "spread_seconds": {name: [round(min(each), 3), round(max(each), 3)] for name, each in times.items()},
        "ask_over_import_torch": round(ratio, 3),
        "claims": {
            f"ask at most {MOST:g}x": ratio <= MOST,
            f"help under {HELP_SECONDS:g} s": middle["help"] < HELP_SECONDS,
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(0 if all(result["claims"].values()) else 1)


if __name__ == "__main__":
    main()
