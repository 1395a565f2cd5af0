"""Functions that return a whole recipe."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .core.config import from_dict, nearest, read_yaml, to_dict
from .core.errors import ConfigError
from .data.images import CLIP_MEAN, CLIP_STD, PadSquare, Scaling, Square
from .encoders.vit import ViTConfig
from .fusion.projector import ProjectorConfig
from .language.decoder import DecoderConfig
from .model import VLMConfig
from .training.adapters import Lora
from .training.recipe import Recipe, Source, Stage
from .training.sources import FilesSource, ScenesSource
from .zoo.families import ROWS


def sightline_mini() -> Recipe:
    """The default model: a small ViT with a convolutional stem, an MLP, a small decoder, all on the scenes world."""
    model = VLMConfig(
        image=ViTConfig(
            image_size=128, patch_size=16, width=192, depth=6, heads=6, mlp=768, stem=(32, 64, 128), pre_norm=True
        ),
        fusion=ProjectorConfig(inputs=192, width=192, layers=2, hidden=512),
        decoder=DecoderConfig(
            vocab_size=1024,
            width=192,
            depth=6,
            heads=6,
            mlp=512,
            tied=True,
            scale_embedding=True,
            qk_norm=True,
            max_length=768,
        ),
    )
    plain = partial(ScenesSource, kind="plain", first=3, grown=20_000)
    sources: dict[str, Source] = {
        "pictures": ScenesSource(kind="pictures"),
        "text": ScenesSource(kind="text", start=20_000_000, first=3, grown=10_000),
        "aligned": ScenesSource(kind="pictures", start=40_000_000),
        "things": plain(start=45_000_000, asks=("color", "shape"), distinct=True),
        "places": plain(start=47_000_000, asks=("locate", "relation"), distinct=True),
        "sides": plain(start=48_000_000, asks=("relation",), distinct=True),
        "numbers": plain(start=49_000_000, asks=("count",)),
        "easy": ScenesSource(kind="questions", start=50_000_000, first=3, grown=80_000),
        "questions": ScenesSource(kind="questions", start=55_000_000, first=6, grown=40_000),
    }
    taught = partial(
        Stage,
        learn={"fusion.*": 1e-3, "decoder.*": 1e-3},
        objective={"answers": 1.0},
        optimizer="muon",
        decay=0.0,
    )
    stages = (
        Stage(
            name="encoder",
            learn={"encoder.*": 3e-3},
            data={"pictures": 1.0},
            objective={"dense": 1.0, "siglip": 0.3},
            steps=3000,
            batch=32,
            optimizer="muon",
            decay=1.0,
        ),
        Stage(
            name="language",
            learn={"decoder.*": 1e-3},
            data={"text": 1.0},
            steps=100,
            batch=8,
            optimizer="muon",
            decay=0.4,
        ),
        Stage(
            name="align",
            learn={"fusion.*": 3e-3},
            data={"aligned": 1.0},
            objective={"words": 1.0},
            steps=250,
            batch=32,
            decay=1.0,
        ),
        taught("look", data={"things": 1.0}, steps=500, batch=16),
        taught("read", data={"easy": 1.0}, steps=2794, batch=8),
        taught("place", data={"places": 0.7, "easy": 0.3}, steps=400, batch=16),
        taught("relate", data={"sides": 1.0}, steps=400, batch=16),
        taught("number", data={"numbers": 0.7, "easy": 0.3}, steps=400, batch=16),
        taught("instruct", data={"questions": 1.0}, steps=9_800, batch=8, decay=0.5),
    )
    return Recipe("sightline-mini", model, Square(128), sources, stages)


def tiny() -> Recipe:
    """A small decoder that learns in a minute or two to name colours and shapes, with the default model's encoder.

    What `compare` begins from: every fusion fits its decoder, and its scenes of two things ask for looking at the right
    one of them.
    """
    model = VLMConfig(
        image=sightline_mini().model.image,
        fusion=ProjectorConfig(inputs=192, width=96, layers=2),
        decoder=DecoderConfig(vocab_size=1024, width=96, depth=3, heads=4, mlp=256, tied=True, max_length=256),
    )
    pairs = ScenesSource(
        kind="plain", start=60_000_000, asks=("color", "shape"), distinct=True, first=2, grown=1_000_000_000
    )
    stage = Stage(
        name="look",
        learn={"fusion.*": 3e-3, "decoder.*": 3e-3},
        data={"pairs": 1.0},
        steps=300,
        batch=16,
        objective={"answers": 1.0},
        precision="fp32",
        decay=0.5,
    )
    return Recipe(
        "tiny",
        model,
        Square(128),
        {"pairs": pairs},
        (stage,),
        max_length=256,
        start="sightline-mini",
        taken=("encoder.*",),
    )


# ---------------------------------------------------------------------------------------------------- published ones
#
# Rates, sizes and steps are those of the paper or the scripts that each names. A batch is what one device was given, or
# a share of the whole that fits one; the whole is batch times accumulate. Their data sets are not here.


def _cosine(steps: int, warmup: int, floor: float = 0.0) -> dict[str, Any]:
    """A rate that rises over `warmup` steps and falls along half a cosine to a share of its peak."""
    return {"steps": steps, "warmup": warmup, "schedule": "cosine", "decay": 1 - warmup / steps, "floor": floor}


def _files(format: str, text: int = 256) -> Source:
    """A data set in a format, its samples with so many tokens of text; where it lies is to be given."""
    return FilesSource(kind="conversations", format=format, text=text)


CAPTIONS = _files("shards", 24)


def llava_15(size: str, lora: bool = False) -> Recipe:
    """LLaVA-1.5 (arXiv:2310.03744; scripts/v1_5 of haotian-liu/LLaVA, where the second stage has LoRA as well)."""
    row = ROWS[f"llava-1.5-{size}"]
    stage = partial(Stage, betas=(0.9, 0.999), weight_decay=0.0, accumulate=8)
    decoder = Lora(128, alpha=256, rate=2e-4, dropout=0.05) if lora else 2e-5
    stages = (  # an epoch each of 558,128 and 665,298 samples, 3% of it warm-up
        stage(name="align", learn={"fusion.*": 1e-3}, data={"lcs_558k": 1.0}, batch=32, **_cosine(2181, 66)),
        stage(
            name="instruct",
            learn={"fusion.*": 2e-5, "decoder.*": decoder},
            data={"mix_665k": 1.0},
            batch=16,
            **_cosine(5198, 156),
        ),
    )
    sources = {"lcs_558k": _files("llava", 24), "mix_665k": _files("llava")}
    name = f"{row.name}-lora" if lora else row.name
    return Recipe(name, row.model, PadSquare(336), sources, stages, "llava-v1", "decimals", max_length=2048)


def blip_2(size: str) -> Recipe:
    """BLIP-2's second stage with OPT (arXiv:2301.12597, section 3.4); the first has objectives that are not here."""
    row = ROWS[f"blip2-opt-{size}"]
    generate = Stage(
        name="generate",
        learn={"fusion.*": 1e-4},
        data={"pairs_129m": 1.0},
        batch=120,
        accumulate=16,
        weight_decay=0.05,
        **_cosine(80_000, 2000, floor=0.5),
    )
    return Recipe(row.name, row.model, _square(224), {"pairs_129m": CAPTIONS}, (generate,))


def qwen_vl(side: int) -> Recipe:
    """Qwen-VL (arXiv:2308.12966): its first stage sees 224 pixels, the other two 448.

    There the encoder's rate also fell by 5% from each block to the one before it.
    """
    model = _seeing(ROWS["qwen-vl"].model, side)
    stage = partial(Stage, weight_decay=0.05)
    pretrain = stage(
        name="pretrain",
        learn={"encoder.*": 2e-4, "fusion.*": 2e-4},
        data={"pairs_1400m": 1.0},
        batch=64,
        accumulate=480,
        **_cosine(50_000, 500, floor=0.005),
    )
    tasks = stage(
        name="tasks",
        learn={"*": 5e-5},
        data={"seven_tasks": 1.0},
        batch=16,
        accumulate=256,
        **_cosine(19_000, 400, floor=0.2),
    )
    instruct = stage(
        name="instruct",
        learn={"fusion.*": 1e-5, "decoder.*": 1e-5},
        data={"dialogues_350k": 1.0},
        batch=8,
        accumulate=16,
        **_cosine(8000, 3000, floor=0.1),
    )
    if side == 224:
        pairs = {"pairs_1400m": CAPTIONS}
        return Recipe("qwen-vl-224", model, _square(side), pairs, (pretrain,), codec="qwen-vl")
    sources = {"seven_tasks": _files("openai", 64), "dialogues_350k": _files("openai")}
    return Recipe("qwen-vl", model, _square(side), sources, (tasks, instruct), codec="qwen-vl", max_length=2048)


def cogvlm(side: int) -> Recipe:
    """CogVLM's two stages of pretraining (arXiv:2311.03079, section 2.2).

    The second half of the second saw 490 pixels, the rest 224. What the rates fall to is not told; here it is zero.
    """
    model = _seeing(ROWS["cogvlm-chat"].model, side)
    stage = partial(Stage, batch=16, weight_decay=0.05, betas=(0.9, 0.95))
    if side == 224:
        pairs = stage(
            name="pretrain",
            learn={"fusion.*": 1e-4, "decoder.blocks.*.vision.*": 1e-4},
            data={"pairs_1500m": 1.0},
            accumulate=512,
            **_cosine(120_000, 12_000),
        )
        return Recipe("cogvlm-224", model, _square(side), {"pairs_1500m": CAPTIONS}, (pairs,), codec="cogvlm")
    places = stage(
        name="places",
        learn={"fusion.*": 1e-5, "decoder.blocks.*.vision.*": 1e-5},
        data={"pairs_and_places": 1.0},
        accumulate=64,
        **_cosine(60_000, 1200),
    )
    sources = {"pairs_and_places": _files("openai", 48)}
    return Recipe("cogvlm", model, _square(side), sources, (places,), codec="cogvlm", max_length=2048)


def _seeing(model: VLMConfig, side: int) -> VLMConfig:
    """A design at another size of pictures."""
    return replace(model, image=replace(model.image, image_size=side))


def _square(side: int) -> Square:
    """A picture stretched to a square, its colours as CLIP has them."""
    return Square(side, Scaling(CLIP_MEAN, CLIP_STD))


RECIPES: dict[str, Callable[[], Recipe]] = {
    "sightline-mini": sightline_mini,
    "tiny": tiny,
    **{f"llava-1.5-{size}": partial(llava_15, size) for size in ("7b", "13b")},
    **{f"llava-1.5-{size}-lora": partial(llava_15, size, lora=True) for size in ("7b", "13b")},
    **{f"blip2-opt-{size}": partial(blip_2, size) for size in ("2.7b", "6.7b")},
    "qwen-vl-224": partial(qwen_vl, 224),
    "qwen-vl": partial(qwen_vl, 448),
    "cogvlm-224": partial(cogvlm, 224),
    "cogvlm": partial(cogvlm, 490),
}


def recipe(name: str) -> Recipe:
    """The recipe of that name, of which ConfigError tells the nearest one, or the one in a YAML or JSON file."""
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        return recipe_file(Path(name))
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]()


def recipe_file(path: Path) -> Recipe:
    """A recipe of one's own; what it does not say, it takes from the recipe that it names as `base`, if any."""
    said = read_yaml(path)
    base = said.pop("base", None)
    given = {} if base is None else to_dict(recipe(str(base)))
    return from_dict(Recipe, {**given, "name": path.stem, **said}, str(path))
