"""What a model makes of pictures that nobody here made: rows answered, and right answers by kind of picture.

The file holds rows {"image", "question", "answers" or "boxes", "pack"}. Words are compared in lower case without
punctuation, yes being true; a place is right where a box overlaps the true one by half, or, where a page is to be
clicked, the middle of the first place lies in it. Beside each score stands that of always giving the commonest answer.

    python benchmarks/eval_real.py DATA.jsonl [--model FOLDER]
"""

import argparse
import json
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import write

import sightline
from sightline.core.geometry import Box, Frame, iou
from sightline.serving.answers import answer_file
from sightline.serving.sampling import Sampling

SAME = {"true": "yes", "false": "no", **{word: str(n) for n, word in enumerate(("zero", "one", "two", "three"))}}


def plain(text: str) -> str:
    """Lower case, without punctuation, yes for true."""
    words = re.sub(r"[^\w ]", "", str(text).lower()).split()
    return " ".join(SAME.get(word, word) for word in words)


def right(row: dict[str, Any]) -> bool:
    """Whether the row's answer is the given one."""
    if row.get("kind") in ("gui", "ground"):
        return placed(row)
    return plain(row["answer"]) in {plain(answer) for answer in row["answers"]}


def placed(row: dict[str, Any]) -> bool:
    """Whether the row's places are the given ones."""
    frame = Frame(1_000_000, 1_000_000)  # of pixels that are all of one picture
    found = [Box(*box["xyxy"], frame) for box in row["boxes"]]
    truth = [Box(*map(float, box), frame) for box in row["given_boxes"]]
    if row["kind"] == "ground":
        return any(iou(a, b) >= 0.5 for a in found for b in truth)
    middles = [((b.x1 + b.x2) / 2, (b.y1 + b.y2) / 2) for b in found] + [tuple(p["xy"]) for p in row["points"]]
    return bool(middles) and any(b.x1 <= middles[0][0] <= b.x2 and b.y1 <= middles[0][1] <= b.y2 for b in truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.jsonl"
        done = answer_file(sightline.load(args.model), args.data, out, Sampling())
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == done.rows and all(("answer" in row) != ("error" in row) for row in rows)
    by_pack: dict[str, dict[str, Any]] = {}
    for name in sorted({f"{row['pack']}, {row['kind']}" for row in rows}):
        members = [row for row in rows if f"{row['pack']}, {row['kind']}" == name]
        answers = Counter(plain(row["answers"][0]) for row in members if row.get("answers"))
        words = members[0].get("kind") not in ("gui", "ground")
        by_pack[name] = {
            "rows": len(members),
            "errors": sum("error" in row for row in members),
            "right": round(sum("answer" in row and right(row) for row in members) / len(members), 3),
            "commonest": round(answers.most_common(1)[0][1] / len(members), 3) if words and answers else None,
            "answers": dict(Counter(row.get("answer", row.get("error")) for row in members).most_common(3)),
        }
        print(name, by_pack[name])
    result = {"rows": done.rows, "errors": done.errors, "seconds": round(time.perf_counter() - began, 1)}
    print(result)
    if not args.dry:
        print("written to", write("real", {**result, "packs": by_pack}))


if __name__ == "__main__":
    main()
