"""The project's own recipes."""

from functools import partial

from ..data.images import Square
from ..encoders.vit import ViTConfig
from ..fusion.projector import ProjectorConfig
from ..language.decoder import DecoderConfig
from ..model import VLMConfig
from ..training.recipe import Recipe, Source, Stage
from ..training.sources import ScenesSource


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
        "distances": plain(start=49_500_000, asks=("distance",), distinct=True),
        "easy": ScenesSource(kind="questions", start=50_000_000, first=3, grown=80_000),
        "questions": ScenesSource(kind="questions", start=55_000_000, first=6, grown=40_000),
        "all": ScenesSource(kind="questions", start=62_000_000),
        "talks": ScenesSource(kind="questions", start=63_000_000, turns=6, multi_turn=True),
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
        taught("measure", data={"distances": 0.6, "all": 0.4}, steps=600, batch=8),
        taught("converse", data={"all": 0.75, "talks": 0.25}, steps=2_400, batch=8, decay=1.0),
        taught("settle", data={"distances": 0.4, "all": 0.35, "talks": 0.25}, steps=2_600, batch=8, decay=1.0),
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
