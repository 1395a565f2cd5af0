"""Six short questions about each picture, one word each, against transformers' batched generate.

Here a picture is seen and its prefix read once for all six. transformers gets ready pixels, this side encoded pictures.
The claims: at least 4x the questions a second, and in float32 the same answers.

    python benchmarks/bench_answers.py [--shape micro] [--images 8] [--rounds 3]
"""

import argparse
import random
import statistics
from typing import Any

import numpy as np
import PIL.Image
import torch
from common import interleaved, write
from peers import IMAGE_TOKEN, pair

from sightline.core.sequence import Image, ask
from sightline.data.images import CenterCrop
from sightline.data.processor import Processor
from sightline.data.template import TEMPLATES
from sightline.language.tokenizer import train_tokenizer
from sightline.serving.engine import Engine
from sightline.serving.sampling import Sampling
from sightline.zoo.prepared import prepared

QUESTIONS, BATCH, WORDS = 6, 12, 14
CONTROLS = ("<pad>", "<s>", "</s>", "<unk>", "<reserved>", "<image>")  # the sixth is IMAGE_TOKEN
VOCABULARY = [f"{a}{b}" for a in ("ra", "be", "ti", "do", "lun", "ka", "mo", "sel") for b in ("t", "n", "p", "s")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=["micro", "small"])
    parser.add_argument("--precision", action="append", choices=["fp32", "bf16"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    rows = []
    for shape in args.shape or ["micro"]:
        for precision in args.precision or ["fp32", "bf16"]:
            rows.append(compare(shape, precision, args.images, args.rounds))
            print(rows[-1], flush=True)
    if not args.dry:
        print("written to", write("answers", rows))


def compare(shape: str, precision: str, images: int, rounds: int) -> dict[str, Any]:
    """Questions a second of both, and whether their answers are the same."""
    theirs, ours = pair(shape)
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(VOCABULARY, k=WORDS)) + "?" for _ in range(images * QUESTIONS)]
    tokenizer = train_tokenizer(sentences, 400, CONTROLS, bos="<s>", eos="</s>", pad="<pad>")
    assert tokenizer.control("<image>") == IMAGE_TOKEN
    pixels = CenterCrop(224, 224)
    num_tokens, patch = ours.fusion.num_tokens, ours.config.image.patch_size
    processor = Processor(tokenizer, TEMPLATES["llava-hf"], pixels, num_tokens, patch, "<image>")
    noise = np.random.default_rng(0)
    pictures = [
        Image(PIL.Image.fromarray(noise.integers(0, 255, (240, 320, 3), dtype=np.uint8))) for _ in range(images)
    ]
    talks = [ask(sentence, pictures[i // QUESTIONS]) for i, sentence in enumerate(sentences)]
    examples = [processor(talk) for talk in talks]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    theirs = theirs.to(dtype)
    engine = Engine(prepared(ours, precision), processor)

    def hf() -> list[int]:
        out = []
        for start in range(0, len(examples), BATCH):
            chunk = examples[start : start + BATCH]
            longest = max(example.length for example in chunk)
            ids = torch.full((len(chunk), longest), tokenizer.control("<pad>"))
            for row, example in enumerate(chunk):
                ids[row, longest - example.length :] = example.ids
            inputs = {"input_ids": ids, "attention_mask": (ids != tokenizer.control("<pad>")).long()}
            stacked = torch.stack([example.pixels[0] for example in chunk]).to(dtype)
            with torch.inference_mode():
                new = theirs.generate(**inputs, pixel_values=stacked, max_new_tokens=1, do_sample=False)[:, longest:]
            out += new[:, 0].tolist()
        return out

    def mine() -> list[int]:
        replies = engine.answer(talks, Sampling(max_new_tokens=1))
        return [reply.ids[0] if reply.ids else engine.end for reply in replies]

    same = sum(a == b for a, b in zip(hf(), mine(), strict=True)) / len(talks)
    times = interleaved({"transformers": hf, "sightline": mine}, rounds)
    speed = {name: round(len(talks) / statistics.median(seconds), 2) for name, seconds in times.items()}
    ratio = round(speed["sightline"] / speed["transformers"], 3)
    claims = {"at least 4x": ratio >= 4} | ({"the same answers": same == 1} if precision == "fp32" else {})
    return {
        "shape": shape,
        "precision": precision,
        "tokens": examples[0].length,
        "questions_per_second": speed,
        "ratio": ratio,
        "same_answers": round(same, 4),
        "claims": claims,
    }


if __name__ == "__main__":
    main()
