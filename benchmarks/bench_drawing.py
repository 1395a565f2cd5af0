"""Pictures a second of the scenes world on one core: laid out, drawn, and with questions asked of them.

The claim: at least 300 pictures a second, laid out and drawn.

    python benchmarks/bench_drawing.py [--rounds 5]
"""

import argparse
import random
import statistics
from itertools import count

from common import interleaved, write

from sightline.worlds.scene_questions import questions
from sightline.worlds.scenes import scene

PICTURES = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    first = count(0, PICTURES)  # fresh seeds in every round: what a scene draws with is kept from one to the next

    def drawn() -> None:
        start = next(first)
        for seed in range(start, start + PICTURES):
            scene(seed).picture()

    def asked() -> None:
        start = next(first)
        for seed in range(start, start + PICTURES):
            made = scene(seed)
            made.picture()
            questions(made, random.Random(seed), 12)

    times = interleaved({"drawn": drawn, "drawn, with 12 questions": asked}, args.rounds)
    rows = [
        {"what": name, "pictures_per_second": round(PICTURES / statistics.median(found), 1)}
        for name, found in times.items()
    ]
    for row in rows:
        print(f"{row['what']:<26} {row['pictures_per_second']} a second on one core")
    if not args.dry:
        print(write("drawing", rows))


if __name__ == "__main__":
    main()
