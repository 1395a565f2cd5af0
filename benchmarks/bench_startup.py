"""From a cold start to an answer: `sightline ask` and `sightline --help` beside `python -c "import torch"`.

Every round starts one process of each kind, one after the other, so that whatever else the machine does falls on all;
the result is the median over rounds. The claims: an answer takes at most twice as long as importing torch, help under
half a second.

    python benchmarks/bench_startup.py [--rounds 15] [--model FOLDER] [--tokens N]

Without --model it is the default model. Random weights of the same sizes take the same time for the same number of
tokens, but do not know when to end, so --tokens cuts them off.
"""

import argparse
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from common import interleaved, write

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "assets" / "shapes.png"
MOST = 2.0  # times importing torch
HELP_SECONDS = 0.5


def run(command: list[str]) -> None:
    """A process that must succeed."""
    subprocess.run(command, check=True, capture_output=True)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    runs = {name: partial(run, command) for name, command in commands(args.model, args.tokens).items()}
    times = interleaved(runs, args.rounds)
    middle = {name: round(statistics.median(each), 3) for name, each in times.items()}
    ratio = round(middle["ask"] / middle["import torch"], 3)
    result = {
        "model": Path(args.model).name if args.model else "default",
        "median_seconds": middle,
        "spread_seconds": {name: [round(min(each), 3), round(max(each), 3)] for name, each in times.items()},
        "ask_over_import_torch": ratio,
        "claims": {
            f"ask at most {MOST:g}x": ratio <= MOST,
            f"help under {HELP_SECONDS:g} s": middle["help"] < HELP_SECONDS,
        },
    }
    print(result)
    if not args.dry:
        print("written to", write("startup", result))


if __name__ == "__main__":
    main()
