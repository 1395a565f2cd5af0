"""Whole training steps beside transformers' Trainer and a plain loop over its model: batch 32, the same weights.

Each side is given its inputs as tensors in memory. The claims, in samples a second: only the projector learning at
least 1.5x both; with the encoder's features kept, from the second epoch on, at least 2x; everything learning at least
1.4x; mixed lengths of 20 to 200 text tokens packed into rows with under 5% of padding at least 1.8x what Trainer does
with padded batches. `waiting`: our trainer on JPEG files of 640x480 with one worker waits under 2% of the time.

    python benchmarks/bench_trainer.py [--case full] [--rounds 3]
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from bench_training import BATCH, LEARNED, TEXT, inputs, learning, step_of
from common import write
from peers import IMAGE_TOKEN, SLOTS, pair

from sightline.core.layout import Medium
from sightline.data.batch import IGNORE, Batch, Example, collate, pack, row_length, sizes_of
from sightline.data.images import CLIP_MEAN, CLIP_STD, Scaling, Square
from sightline.model import VLM
from sightline.training.features import FeatureStore
from sightline.training.objectives import NextToken, Total
from sightline.training.recipe import Recipe, Stage
from sightline.training.run import run
from sightline.training.sources import FilesSource
from sightline.training.trainer import Trainer
from sightline.worlds.scenes import scene

CLAIMS = {"projector": 1.5, "features": 2.0, "full": 1.4, "packed": 1.8}
PACKING, PADDING, WAITING = 1024, 0.05, 0.02
PICTURES, STEPS = 256, 8  # of the case `waiting`
PIXELS = Square(224, Scaling(CLIP_MEAN, CLIP_STD))
Side = Callable[[], float]  # does one step and returns its seconds


def recipe(model: VLM, full: bool, **stage: Any) -> Recipe:
    """One stage of the micro model in bf16."""
    learn = {"*": 1e-4} if full else {"fusion.*": 1e-4}
    only = Stage("only", learn, {"rows": 1.0}, batch=BATCH, warmup=0, decay=0.0, **stage)
    rows = FilesSource(kind="conversations", format="llava")
    return Recipe("micro", model.config, PIXELS, {"rows": rows}, (only,), vocabulary=4096)


def ours(model: VLM, batch: Batch, full: bool, store: FeatureStore | None = None) -> Side:
    """A step of this project's trainer."""
    plan = recipe(model, full, steps=1_000)
    objective = Total({"next-token": NextToken()}, {"next-token": 1.0})
    trainer = Trainer(plan, plan.stages[0], model.train(), objective, Path(tempfile.mkdtemp()), store=store)
    trainer.keep_features()
    return timed(lambda: trainer.learn([batch]))


def timed(step: Callable[[], Any]) -> Side:
    """A step that tells its seconds."""

    def run_once() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return run_once


class Watch(hf.TrainerCallback):  # type: ignore[misc]
    """How long a step takes between the calls before and after it, its set-up left out."""

    def __init__(self) -> None:
        self.began, self.took = 0.0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.took = time.perf_counter() - self.began


def trainers(model: Any, rows: dict[str, torch.Tensor], full: bool) -> Side:
    """A step of transformers' Trainer."""
    learning(model, full, "multi_modal_projector")
    options = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True}
    args = hf.TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_steps=1, learning_rate=1e-4, max_grad_norm=1.0,
        lr_scheduler_type="constant", bf16=True, use_cpu=True, remove_unused_columns=False, **options,
    )  # fmt: skip
    samples = [{name: column[i] for name, column in rows.items()} for i in range(BATCH)]

    def step() -> float:
        watch = Watch()
        hf.Trainer(model=model, args=args, train_dataset=samples, callbacks=[watch]).train()
        return watch.took

    return step


def loops(model: Any, rows: dict[str, torch.Tensor], full: bool) -> Side:
    """A step of a plain loop."""
    learning(model, full, "multi_modal_projector")
    return timed(step_of(model, lambda: model(**rows).loss, "bf16"))


def example(ids: torch.Tensor, labels: torch.Tensor, pixels: torch.Tensor) -> Example:
    """One sequence that begins with its picture; labels are those of transformers, not shifted."""
    there, image = torch.arange(len(ids)), ids == IMAGE_TOKEN
    zeros, shifted = torch.zeros_like(ids), torch.cat((labels[1:], torch.tensor([IGNORE])))
    medium = torch.where(image, Medium.IMAGE, Medium.TEXT)
    return Example(ids, there, there, medium, zeros + 1, zeros, shifted, image.nonzero()[:, 0], (pixels,))


def even(vocabulary: int) -> tuple[dict[str, torch.Tensor], list[Example]]:
    """The contract's batch: 196 image and 40 text tokens, labels on the last 24."""
    ids, labels, pixels = inputs(vocabulary)
    rows = {"input_ids": ids, "labels": labels, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    return rows, [example(*each) for each in zip(ids, labels, pixels, strict=True)]


def mixed(vocabulary: int) -> tuple[dict[str, torch.Tensor], list[Example]]:
    """196 image and 20 to 200 text tokens, labels on all text; for Trainer padded to the longest."""
    lengths = [SLOTS + random.Random(f"{i} mixed").randint(20, 200) for i in range(BATCH)]
    there = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    words = torch.randint(10, vocabulary, there.shape)
    words[:, :SLOTS] = IMAGE_TOKEN
    labels = words.masked_fill(~there | (words == IMAGE_TOKEN), IGNORE)
    ids, pixels = words.masked_fill(~there, 0), torch.randn(BATCH, 3, 224, 224)
    rows = {"input_ids": ids, "labels": labels, "pixel_values": pixels, "attention_mask": there.long()}
    cut = zip(ids, labels, pixels, lengths, strict=True)
    return rows, [example(i[:n], label[:n], picture) for i, label, picture, n in cut]


def compared(case: str, rounds: int) -> dict[str, Any]:
    """One case: seconds of each side's step, in turn, and what ours is beside the others'."""
    full = case in ("full", "packed")
    theirs, model = pair("micro")
    patch, vocabulary = model.config.vit.patch_size, model.config.decoder.vocab_size
    rows, examples = mixed(vocabulary) if case == "packed" else even(vocabulary)
    if case == "packed":
        batch = pack(examples, patch, 0, row_length(sizes_of(examples), PACKING))
    else:
        batch = collate(examples, patch, 0)
    store = FeatureStore(Path(tempfile.mkdtemp()), 1 << 30) if case == "features" else None
    sides: dict[str, Side] = {"trainer": trainers(theirs, rows, full), "sightline": ours(model, batch, full, store)}
    if case != "packed":
        sides["loop"] = loops(theirs, rows, full)
    for side in sides.values():
        side()
    found = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
    seconds = {name: round(statistics.median(times), 3) for name, times in found.items()}
    times = {name: round(seconds[name] / seconds["sightline"], 3) for name in sides if name != "sightline"}
    claims = {f"at least {CLAIMS[case]:g}x": min(times.values()) >= CLAIMS[case]}
    row: dict[str, Any] = {"shape": "micro", "case": f"{case} bf16", "seconds": seconds, "faster_than": times}
    if case == "packed":
        row["padding"] = round(float((batch.layout.document < 0).float().mean()), 4)
        row["rows"] = list(batch.ids.shape)
        claims[f"padding under {PADDING:g}"] = row["padding"] < PADDING
    return row | {"claims": claims}


def waiting() -> dict[str, Any]:
    """How long our trainer waits for samples that it reads and prepares from files while it learns."""
    folder, rng = Path(tempfile.mkdtemp()), random.Random(0)
    words = [f"word{i}" for i in range(2_000)]
    rows = []
    for i in range(PICTURES):
        scene(i).picture().resize((640, 480)).save(folder / f"{i}.jpg", quality=90)
        said = [" ".join(rng.choices(words, k=k)) for k in (TEXT - LEARNED, LEARNED)]
        turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), said, strict=True)]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        rows.append({"image": f"{i}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    _, model = pair("micro")
    plan = recipe(model, full=True, steps=STEPS)
    source = FilesSource(kind="conversations", format="llava", path=str(folder / "rows.json"))
    plan = Recipe(**{**vars(plan), "sources": {"rows": source}})
    steps = list(run(plan, folder / "run", workers=1))[1:]  # the first waits for its worker to begin
    took = sum(BATCH / step.samples_per_second for step in steps)
    share = sum(step.waited for step in steps) / took
    claims = {f"waits under {WAITING:g}": share < WAITING}
    row = {"shape": "micro", "case": "waiting", "waited": round(share, 5), "step_seconds": round(took / len(steps), 3)}
    return row | {"claims": claims}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [*CLAIMS, "waiting"]
    parser.add_argument("--case", action="append", choices=cases)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    rows = []
    for case in args.case or cases:
        rows.append(waiting() if case == "waiting" else compared(case, args.rounds))
        print(rows[-1], flush=True)
    if not args.dry:
        print("written to", write("trainer-micro", rows))


if __name__ == "__main__":
    main()
