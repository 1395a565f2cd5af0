"""First token and each next one against transformers' generate: 196 image and 32 text tokens, then 64 greedy ones.

The first token's time is that of an answer of one token; a next token's is what 64 more take, divided by 64. Both sides
start from `input_ids` and `pixel_values` in memory and hold the same weights. int8 is compared with transformers in
bfloat16, which has no int8 of its own on a CPU. The claims: first token at most 0.7x in bf16 and 0.9x in fp32, next
tokens at most 0.6x, with int8 weights at most 0.35x.

    python benchmarks/bench_generate.py [--shape micro] [--batch 1] [--rounds 5]
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleaved, write
from peers import IMAGE_TOKEN, SLOTS, pair

from sightline.zoo.prepared import dtype_of
from sightline.zoo.published import Published

TEXT, NEW = 32, 64
CLAIMS = {"fp32": (0.9, 0.6), "bf16": (0.7, 0.6), "int8": (0.7, 0.35)}


def runs(shape: str, batch: int, precision: str) -> dict[str, Callable[[], Any]]:
    """An answer of one token and of 65 by each side."""
    theirs, ours = pair(shape)
    vocabulary = theirs.config.text_config.vocab_size
    published = Published(ours, {"image_token_index": IMAGE_TOKEN}, "llava", Path(), precision)
    theirs = theirs.to(dtype_of(precision))
    words = torch.randint(10, vocabulary, (batch, TEXT))
    ids = torch.cat([torch.full((batch, SLOTS), IMAGE_TOKEN), words], dim=1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 224, 224)}
    hf_inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype_of(precision))}
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}

    def hf(new: int) -> torch.Tensor:
        with torch.inference_mode():
            out: torch.Tensor = theirs.generate(**hf_inputs, **options, max_new_tokens=new, min_new_tokens=new)
            return out[:, ids.shape[1] :]

    def mine(new: int) -> torch.Tensor:
        return published.generate_ids(max_new_tokens=new, **inputs)

    if precision == "fp32":
        assert torch.equal(hf(1 + NEW), mine(1 + NEW)), "the two wrote different tokens"
    return {
        "transformers first": lambda: hf(1),
        "sightline first": lambda: mine(1),
        "transformers all": lambda: hf(1 + NEW),
        "sightline all": lambda: mine(1 + NEW),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=["micro", "small"])
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--precision", action="append", choices=list(CLAIMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    for shape in args.shape or ["micro", "small"]:
        rows = []
        for batch in args.batch or [1, 8]:
            for precision in args.precision or list(CLAIMS):
                times = interleaved(runs(shape, batch, precision), args.rounds)
                middle = {name: statistics.median(seconds) for name, seconds in times.items()}
                row: dict[str, Any] = {"shape": shape, "batch": batch, "precision": precision}
                for who in ("transformers", "sightline"):
                    row[f"{who}_first_ms"] = round(1e3 * middle[f"{who} first"], 2)
                    row[f"{who}_next_ms"] = round(1e3 * (middle[f"{who} all"] - middle[f"{who} first"]) / NEW, 3)
                row["first_ratio"] = round(row["sightline_first_ms"] / row["transformers_first_ms"], 3)
                row["next_ratio"] = round(row["sightline_next_ms"] / row["transformers_next_ms"], 3)
                first, following = CLAIMS[precision]
                row["claims"] = {
                    f"first at most {first:g}x": row["first_ratio"] <= first,
                    f"next at most {following:g}x": row["next_ratio"] <= following,
                }
                rows.append(row)
                print(row, flush=True)
        if not args.dry:
            print("written to", write(f"generate-{shape}", rows))


if __name__ == "__main__":
    main()
