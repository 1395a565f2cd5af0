"""Designs that differ from a recipe's in their fusion alone, and what each of them costs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..core.config import nearest
from ..core.errors import ConfigError
from ..encoders.vit import ViTConfig
from ..fusion.cross_attention import CrossAttentionConfig
from ..fusion.projector import ProjectorConfig
from ..fusion.qformer import QFormerConfig
from ..fusion.resampler import ResamplerConfig
from ..fusion.visual_expert import VisualExpertConfig
from ..model import VLM, VLMConfig
from ..training.adapters import adapt
from ..training.cost import usual_samples
from ..training.plan import STATE, costs_of
from ..training.recipe import Recipe, freeze, learning_rates
from ..zoo.hollow import hollow


def _few(model: VLMConfig) -> int:
    """How many tokens a fusion makes that makes fewer than there are patches: a quarter."""
    return max(1, model.image.grid**2 // 4)


def projected(model: VLMConfig, layers: int) -> ProjectorConfig:
    """A projector of patches."""
    return ProjectorConfig(inputs=model.image.features, width=model.decoder.width, layers=layers)


def _qformer(model: VLMConfig) -> VLMConfig:
    d = model.decoder
    fusion = QFormerConfig(
        model.image.features,
        d.width,
        queries=_few(model),
        hidden=d.width,
        depth=4,
        heads=d.heads,
        mlp=d.mlp,
    )
    return replace(model, fusion=fusion)


def _resampler(model: VLMConfig) -> VLMConfig:
    inputs, heads = model.image.features, model.decoder.heads
    fusion = ResamplerConfig(
        inputs, model.decoder.width, latents=_few(model), depth=2, heads=heads, head_dim=inputs // heads
    )
    return replace(model, fusion=fusion)


def _cross_attention(model: VLMConfig) -> VLMConfig:
    d = model.decoder
    fusion = CrossAttentionConfig(model.image.features, d.width, d.heads, d.mlp, interval=max(1, d.depth // 3), start=0)
    return replace(model, fusion=fusion)


def _native(model: VLMConfig) -> VLMConfig:
    """No encoder: a linear map of pixels, as Fuyu has it."""
    image = ViTConfig(
        image_size=model.image.image_size,
        patch_size=model.vit.patch_size,
        width=model.decoder.width,
        depth=0,
        heads=1,
        mlp=1,
        positions="none",
        final_norm=False,
    )
    return replace(model, image=image, fusion=ProjectorConfig(image.width, image.width, layers=0))


FUSIONS: dict[str, Callable[[VLMConfig], VLMConfig]] = {
    "linear": lambda model: replace(model, fusion=projected(model, 1)),
    "mlp": lambda model: replace(model, fusion=projected(model, 2)),
    "qformer": _qformer,
    "resampler": _resampler,
    "cross-attention": _cross_attention,
    "expert": lambda model: replace(model, fusion=VisualExpertConfig(projected(model, 2))),
    "native": _native,
}


def with_fusion(recipe: Recipe, name: str) -> Recipe:
    """The recipe with another fusion; ConfigError, telling the nearest, for one that there is not.

    Patterns that name nothing of the new design are left out. Without an encoder nothing of it is taken from where the
    recipe starts, and what stands in its place learns as the fusion would.
    """
    if name not in FUSIONS:
        raise ConfigError(f"unknown fusion {name!r}{nearest(name, FUSIONS)}")
    model = FUSIONS[name](recipe.model)
    with hollow():
        parameters = [key for key, _ in VLM(model).named_parameters()]
    native = name == "native"

    def fits(pattern: str) -> bool:
        return any(fnmatchcase(key, pattern) for key in parameters)

    stages = []
    for stage in recipe.stages:
        learn = {pattern: how for pattern, how in stage.learn.items() if fits(pattern)}
        if native and "fusion.*" in stage.learn:
            learn = {"encoder.*": stage.learn["fusion.*"], **learn}
        stages.append(replace(stage, learn=learn))
    taken = tuple(p for p in recipe.taken if fits(p) and not (native and p.startswith("encoder.")))
    return replace(recipe, name=f"{recipe.name}-{name}", model=model, stages=tuple(stages), taken=taken)


def stretched(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with its stages longer or shorter."""
    stages = [replace(stage, steps=max(1, round(stage.steps * factor))) for stage in recipe.stages]
    return replace(recipe, stages=tuple(stages))


@dataclass(frozen=True)
class Price:
    """What a design costs: tokens of a picture, learned parameters, operations of the run, bytes while it trains."""

    visual: int
    learned: int
    operations: float
    memory: int


def price(recipe: Recipe) -> Price:
    """The price of a recipe; of several stages the operations of all and the most of the rest."""
    with hollow():
        model = VLM(recipe.model)
    visual = learned = memory = 0
    operations = 0.0
    for stage in recipe.stages:
        with hollow():
            adapt(model, stage.learn)
        rates = learning_rates(model, stage.learn)
        freeze(model, rates)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        costs = costs_of(recipe, stage, model, usual_samples(recipe, stage))
        shares = {name: weight / sum(stage.data.values()) for name, weight in stage.data.items()}
        per_sample = sum(shares[name] * each.operations for name, each in costs.items())
        operations += per_sample * stage.steps * stage.batch * stage.accumulate
        mine = sum(sizes[name] for name in rates)
        kept = max(each.memory(stage.batch, stage.precision) for each in costs.values())
        visual, learned = max(visual, *(each.visual for each in costs.values())), max(learned, mine)
        memory = max(memory, kept + 4 * sum(sizes.values()) + STATE * mine)
    return Price(visual, learned, operations, memory)
