"""How well a model reads scenes of seeds that training never asked for: by kind of question, beside controls.

The same questions are asked with the picture, with a blank one and with another scene's; a model that looks falls to
the questions' prior on the last two. In a talk each comes after up to three others about the same picture. The claims
are those of the default model's first version, trained on a CPU.

    python benchmarks/eval_scenes.py [--model FOLDER] [--count 2000] [--card]

--card writes the scores and the recipe into the model's own README.md.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import write

import sightline
from sightline.core.sequence import Conversation
from sightline.evaluation.scenes import evaluate
from sightline.grounding.codecs import Grounded
from sightline.recipes import sightline_mini
from sightline.zoo import own
from sightline.zoo.describe import count
from sightline.zoo.names import locate

CLAIMS = {
    "overall": 0.85,
    "count 1-6": 0.85,
    "left/right/above/below": 0.85,
    "existence": 0.92,
    "boxes at IoU 0.5": 0.75,
}
CONTROLS = ("real", "blank", "shuffled", "talk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--control", action="append", choices=CONTROLS)
    parser.add_argument("--first", type=int, default=900_000_000, help="the first seed")
    parser.add_argument("--card", action="store_true", help="write the model's README.md")
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
    if args.card:
        folder = locate(args.model)
        (folder / "README.md").write_text(card(folder, result), encoding="utf-8")
    if not args.dry:
        print("written to", write("scenes", result))


def card(folder: Path, result: dict[str, Any]) -> str:
    """The model card: what the model is, what it learned from, how, and what it scores."""
    about, recipe = own.read_card(folder), sightline_mini()
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md") / (1 << 20)
    kinds = {name: source.kind for name, source in recipe.sources.items()}
    stages = [
        f"| {stage.name} | {', '.join(stage.learn)} | {', '.join(kinds[name] for name in stage.data)} "
        f"| {stage.steps:,} | {stage.batch} |"
        for stage in recipe.stages
    ]
    scores = [
        f"| {name} | " + " | ".join(f"{result[control].get(name, 0):.1%}" for control in CONTROLS) + " |"
        for name in result["real"]
    ]
    missed = [claim for claim, kept in result["claims"].items() if not kept]
    return CARD.format(
        name=about.name,
        millions=count(about.model) / 1e6,
        size=size,
        image=about.model.image,
        fusion=about.model.fusion,
        tokens=about.model.image.grid**2,
        decoder=about.model.decoder,
        recipe=recipe.name,
        stages="\n".join(stages),
        scores="\n".join(scores),
        questions=result["questions"],
        missed="; ".join(missed) or "none",
    )


CARD = """# {name}

A vision-language model of {millions:.1f} million parameters ({size:.1f} MiB in bfloat16), the package's default. It
answers questions about drawn scenes of coloured shapes, in words, boxes and points. Apache-2.0, trained by this project
on nothing but its own synthetic world.

## What it is made of

- encoder: ViT, {image.depth} blocks of width {image.width}, strided convolutions before them, pictures of
  {image.image_size}x{image.image_size} pixels in patches of {image.patch_size}
- fusion: MLP of {fusion.layers} layers, {tokens} visual tokens a picture
- language model: {decoder.depth} blocks of width {decoder.width}, vocabulary {decoder.vocab_size}, places as tokens

## What it learned from

Scenes of `sightline.worlds.scenes`: one to twelve shapes in ten colours, four textures and two sizes, on plain and busy
backgrounds, in several drawing styles, with exact answers. No picture of anybody else.

| stage | learned | from | steps | samples a step |
|---|---|---|---|---|
{stages}

`sightline train {recipe}` does it again, on a CPU or a GPU, and goes on where it was stopped. These
weights are the mean of those after the last two stages (`sightline.training.export.average`).

## Scores

{questions:,} questions about scenes of unseen seeds, answers exact; the same questions with a blank picture, with
another scene's, and in a talk, after up to three others, stand beside them. `benchmarks/eval_scenes.py` measures it.

| | picture | blank | another's | in a talk |
|---|---|---|---|---|
{scores}

Aims that it misses: {missed}.

## Limits

It knows no photographs, no text in pictures, no words outside its world, and English only. On anything but drawn scenes
its answers are guesses in the form of answers. In a talk each question has to stand for itself: what "it" is, it does
not know.
"""


if __name__ == "__main__":
    main()
