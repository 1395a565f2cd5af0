"""Kill training runs with SIGKILL at random instants, again and again, and compare each with one that was left alone.

Two stages with Muon and AdamW on a model of some 30,000 parameters. Each attempt is a fork that goes on where the last
one was killed, after a random number of steps and at any instant of the next. The claims: every loss of every step,
those done again too, and all weights at the end are the same bits, and all checkpoints are whole. A failure rate above
3 / kills would have been seen with 95%.

    python benchmarks/kills.py [--kills 1000] [--piece 50] [--processes 1] [--workers 0]

Kills come in pieces, each a run of its own, which are added to the result of the day: started again after it was cut
short, it goes on with the next piece.
"""

import argparse
import datetime
import json
import os
import random
import signal
import socket
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import HERE, write

from sightline.data.images import Square
from sightline.encoders.vit import ViTConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.tokenizer import train_tokenizer
from sightline.model import VLMConfig
from sightline.training import checkpoints, distributed
from sightline.training.recipe import Recipe, Stage
from sightline.training.run import CONTROLS, final_model, run
from sightline.training.sources import ScenesSource

PER_KILL = 6  # steps of the run for each kill; a kill comes after up to twice as many, and costs some
WRONG = ("steps_missing", "losses_that_differ", "weights_that_differ")


def tiny(kills: int, seed: int) -> Recipe:
    """A recipe that cannot be done before so many kills."""
    model = VLMConfig(
        image=ViTConfig(image_size=32, patch_size=16, width=16, depth=1, heads=2, mlp=32),
        fusion=ProjectorConfig(inputs=16, width=24),
        decoder=DecoderConfig(vocab_size=480, width=24, depth=1, heads=2, mlp=48, tied=True, max_length=512),
    )
    sources = {
        "text": ScenesSource(kind="text", start=1_000_000, turns=1, first=2, grown=10_000),
        "questions": ScenesSource(kind="questions", start=2_000_000, turns=1, first=2, grown=10_000),
    }
    shape = {"steps": max(10, kills * PER_KILL // 2), "batch": 2, "precision": "fp32", "warmup": 2}
    stages = (
        Stage("language", {"decoder.*": 1e-2}, {"text": 1.0}, optimizer="muon", accumulate=2, save_every=3, **shape),
        Stage("instruct", {"*": 1e-3}, {"text": 1.0, "questions": 1.0}, save_every=5, **shape),
    )
    return Recipe("tiny", model, Square(32), sources, stages, vocabulary=480, max_length=512, seed=seed)


def start(recipe: Recipe, folder: Path, processes: int, workers: int) -> list[int]:
    """The ids of the processes of one attempt; the first writes the bits of each loss into the folder's `trace`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if processes > 1:
                    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
                    os.environ.update({k: str(v) for k, v in told.items()}, MASTER_ADDR="127.0.0.1")
                torch.set_num_threads(1)
                with distributed.joined():
                    trace = os.open(folder / "trace", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                    for step in run(recipe, folder, workers=workers):
                        line = f"{step.stage} {step.step} {struct.pack('<d', step.loss).hex()}\n"
                        os.write(trace, line.encode() if rank == 0 else b"")
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return children


def ended(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def trace_of(folder: Path) -> list[tuple[str, ...]]:
    """(stage and step, bits) of all steps that were done."""
    path = folder / "trace"
    return [tuple(line.rsplit(" ", 1)) for line in path.read_text().splitlines()] if path.exists() else []


def piece(kills: int, seed: int, processes: int, workers: int) -> dict[str, Any]:
    """One run that is killed so often, held against one that was left alone."""
    rng, began, recipe = random.Random(seed), time.monotonic(), tiny(kills, seed)
    texts = ["how many red circles are there? where is the large blue square?"] * 30
    tokenizer = train_tokenizer(texts, 480, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")
    with tempfile.TemporaryDirectory() as place:
        whole, folder = Path(place, "whole"), Path(place, "killed")
        for each in (whole, folder):
            (each / "tokenizer").mkdir(parents=True)
            tokenizer.save(each / "tokenizer")
        assert ended(start(recipe, whole, processes, workers)) == [0] * processes
        wanted = dict(trace_of(whole))
        for _ in range(kills):
            until = len(trace_of(folder)) + rng.randint(0, 2 * PER_KILL - 1)
            children = start(recipe, folder, processes, workers)
            while len(trace_of(folder)) < until:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            for child in rng.sample(children, len(children)):  # the others as torchrun does, which may not have met yet
                os.kill(child, signal.SIGKILL)
            assert -signal.SIGKILL in ended(children), "a run ended before it was killed"
        assert ended(start(recipe, folder, processes, workers)) == [0] * processes
        found = trace_of(folder)
        one, other = (final_model(recipe, each)[0].state_dict() for each in (whole, folder))
        kept = [path for stage in recipe.stages for path in checkpoints.listed(folder / "checkpoints" / stage.name)]
        for path in kept:
            checkpoints.check(path)
        return {
            "seed": seed,
            "processes": processes,
            "workers": workers,
            "kills": kills,
            "steps": len(wanted),
            "steps_done_again": len(found) - len(wanted),
            "steps_missing": len(set(wanted) - set(dict(found))),
            "losses_that_differ": sum(wanted[step] != bits for step, bits in found),
            "weights_that_differ": sum(not torch.equal(one[name], other[name]) for name in one),
            "whole_checkpoints": len(kept),
            "seconds": round(time.monotonic() - began, 1),
        }


def before() -> list[dict[str, Any]]:
    """The pieces of today that are done."""
    path = HERE / "results" / f"kills-{datetime.date.today().isoformat()}.json"
    return list(json.loads(path.read_text())["rows"]["pieces"]) if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--piece", type=int, default=50, help="kills of one run")
    parser.add_argument("--processes", type=int, default=1, help="forks that are one run, killed one after the other")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of each")
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pieces = [] if args.dry else before()
    alike = [each for each in pieces if (each["processes"], each["workers"]) == (args.processes, args.workers)]
    done, number = sum(each["kills"] for each in alike), len(alike)
    while done < args.kills:
        pieces.append(piece(min(args.piece, args.kills - done), number, args.processes, args.workers))
        done, number = done + pieces[-1]["kills"], number + 1
        mismatches = sum(each[key] for each in pieces for key in WRONG)
        print(f"{done} of {args.kills} kills, {mismatches} mismatches: {pieces[-1]}", flush=True)
        if not args.dry:
            total = {"kills": sum(each["kills"] for each in pieces), "mismatches": mismatches}
            print("written to", write("kills", {**total, "pieces": pieces}))
    raise SystemExit(1 if any(each[key] for each in pieces for key in WRONG) else 0)


if __name__ == "__main__":
    main()
