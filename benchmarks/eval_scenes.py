"""How well a model reads scenes of seeds that training never asked for: by kind of question, beside two controls.

The same questions are asked with the picture, with a blank one and with another scene's; a model that looks falls to
the questions' prior on the last two. The claims are those of the default model's first version, trained on a CPU.

    python benchmarks/eval_scenes.py [--model FOLDER] [--count 2000]
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from common import write

import sightline
from sightline.core.sequence import Conversation
from sightline.evaluation.scenes import evaluate
from sightline.grounding.codecs import Grounded

CLAIMS = {
    "overall": 0.85,
    "count 1-6": 0.85,
    "left/right/above/below": 0.85,
    "existence": 0.92,
    "boxes at IoU 0.5": 0.75,
}
CONTROLS = ("real", "blank", "shuffled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--control", action="append", choices=CONTROLS)
    parser.add_argument("--first", type=int, default=900_000_000, help="the first seed")
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    assistant = sightline.load(args.model)

    def answers(talks: Sequence[Conversation]) -> list[Grounded]:
        return [reply.grounded for reply in assistant.engine.answer(talks)]

    rows: dict[str, Any] = {}
    began = time.perf_counter()
    for control in args.control or CONTROLS:
        rows[control] = evaluate(answers, args.count, control, first=args.first).to_dict()
    names = list(next(iter(rows.values())))
    width = max(map(len, names))
    print(f"{'':{width}}", *(f"{control:>9}" for control in rows))
    for name in names:
        print(f"{name:{width}}", *(f"{row.get(name, 0):9.1%}" for row in rows.values()))
    seen = rows.get("real", {})
    claims = {f"{name} at least {least:.0%}": seen[name] >= least for name, least in CLAIMS.items() if name in seen}
    result = {
        "model": assistant.name,
        "questions": args.count,
        "seconds": round(time.perf_counter() - began, 1),
        **rows,
        "claims": claims,
    }
    if not args.dry:
        print("written to", write("scenes", result))


if __name__ == "__main__":
    main()
