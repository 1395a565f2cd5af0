"""A training step against transformers' plain loop: batch 32, 196 image and 40 text tokens, labels on the last 24.

python benchmarks/bench_training.py [--shape micro] [--rounds 3]
"""

import argparse
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleaved, summary, write
from peers import IMAGE_TOKEN, SLOTS, pair

from sightline.core.layout import causal_layout
from sightline.core.patches import patchify
from sightline.data.batch import IGNORE, Batch
from sightline.training.objectives import NextToken

BATCH, TEXT, LEARNED = 32, 40, 24
CLAIMS = {"full bf16": 0.75, "full fp32": 0.9, "projector bf16": 0.7}
MEMORY = {("small", "full bf16"): 0.6}  # where the vocabulary is large
SIDES = ("transformers", "sightline")


def inputs(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels (not shifted) and pixels of one batch."""
    words = torch.randint(10, vocabulary, (BATCH, TEXT))
    ids = torch.cat([torch.full((BATCH, SLOTS), IMAGE_TOKEN), words], dim=1)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -LEARNED:] = ids[:, -LEARNED:]
    return ids, labels, torch.randn(BATCH, 3, 224, 224)


def learning(model: torch.nn.Module, full: bool, projector: str) -> torch.nn.Module:
    """The model in training, where only its projector learns unless all of it does."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(full or projector in name)
    return model.train()


def step_of(model: torch.nn.Module, loss: Callable[[], torch.Tensor], precision: str) -> Callable[[], None]:
    """One optimiser step over whatever asks for gradients."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def runs(shape: str, precision: str, full: bool, check: bool = True) -> dict[str, Callable[[], None]]:
    """Both steps on the same weights and inputs, which agree on the loss."""
    theirs, ours = pair(shape)
    learning(theirs, full, "multi_modal_projector")
    learning(ours, full, "fusion.")
    ids, labels, pixels = inputs(theirs.config.text_config.vocab_size)
    patch = ours.config.image.patch_size
    is_slot = ids == IMAGE_TOKEN
    shifted = torch.cat([labels[:, 1:], torch.full((BATCH, 1), IGNORE)], dim=1)
    batch = Batch(ids, causal_layout(*ids.shape), is_slot.flatten().nonzero()[:, 0], patchify(pixels, patch), shifted)
    objective = NextToken()

    def our_loss() -> torch.Tensor:
        total, count = objective(ours, batch)["next-token"]
        return total / count

    def their_loss() -> torch.Tensor:
        out: Any = theirs(input_ids=ids, pixel_values=pixels, labels=labels)
        return out.loss

    if check:
        with torch.no_grad():
            gap = float(abs(our_loss() - their_loss()))
        assert gap < 1e-3, f"the losses differ by {gap}"
    return {"transformers": step_of(theirs, their_loss, precision), "sightline": step_of(ours, our_loss, precision)}


def alone(shape: str, precision: str, full: bool, side: str) -> Callable[[], None]:
    """The step of one side, the other's weights gone from memory."""
    step = runs(shape, precision, full, check=False)[side]
    gc.collect()
    return step


def peak_mib(shape: str, case: str, side: str) -> int:
    """Peak memory of a process that does two steps of one side."""
    command = [sys.executable, __file__, "--shape", shape, "--case", case, "--peak-of", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="micro", choices=["micro", "small"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", action="append", choices=list(CLAIMS))
    parser.add_argument("--peak-of", choices=SIDES, help="do two steps of one side and print the peak in MiB")
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    if args.peak_of:
        what, precision = args.case[0].split()
        step = alone(args.shape, precision, what == "full", args.peak_of)
        step()
        step()
        # not getrusage, whose peak a process begins with is that of the one that started it
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(int(peak.split()[1]) >> 10)
        return
    rows = []
    for case in args.case or list(CLAIMS):
        what, precision = case.split()
        memory = {side: peak_mib(args.shape, case, side) for side in SIDES}  # first, while there is nothing else
        times = interleaved(runs(args.shape, precision, what == "full"), args.rounds)
        found = {name: summary(seconds) for name, seconds in times.items()}
        ratio = round(found["sightline"]["median_ms"] / found["transformers"]["median_ms"], 3)
        claims = {
            f"at most {CLAIMS[case]:g}x": ratio <= CLAIMS[case],
        }
        held = round(memory["sightline"] / memory["transformers"], 3)
        most = MEMORY.get((args.shape, case), 1.0)
        claims[f"at most {most:g}x the memory"] = held <= most
        about = {"shape": args.shape, "case": case, "ratio": ratio, "memory": held}
        rows.append({**about, **found, "peak_mib": memory, "claims": claims})
        print(rows[-1], flush=True)
    if not args.dry:
        print("written to", write(f"training-{args.shape}", rows))


if __name__ == "__main__":
    main()
