"""Settings of objectives that have some. In a stage one of them may stand in place of the weights of its terms."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ..core.config import config, nearest
from ..core.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Below = Annotated[float, Field(ge=0, lt=0.5)]


@config
class CLIPConfig:
    """Contrast by a softmax over the batch (arXiv:2103.00020); the temperature is where it starts, it is learned."""

    kind: Literal["clip"] = "clip"
    temperature: PositiveFloat = 0.07


@config
class RepresentationConfig:
    """A Q-Former's contrast, matching and generation (arXiv:2301.12597), each counting the same.

    projection: width in which queries and captions are compared. label_smoothing: of contrast and generation.
    max_length: tokens of a caption, with the two around it. The temperature is where it starts, it is learned.
    """

    kind: Literal["qformer"] = "qformer"
    projection: PositiveInt = 256
    temperature: PositiveFloat = 0.07
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_length: Annotated[int, Field(ge=3)] = 32


@config
class DINOConfig:
    """Self-distillation (arXiv:2104.14294) with two global crops and some local ones."""

    kind: Literal["dino"] = "dino"
    prototypes: PositiveInt = 1024
    bottleneck: PositiveInt = 256
    local_crops: NonNegativeInt = 4
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: PositiveFloat = 0.04
    momentum: Share = 0.996  # of the teacher's weights
    center_momentum: Share = 0.9


@config
class BoxesConfig:
    """Weights of the two losses of a box, as in DETR (arXiv:2005.12872)."""

    kind: Literal["boxes"] = "boxes"
    l1: NonNegativeFloat = 5.0
    giou: NonNegativeFloat = 2.0


@config
class DPOConfig:
    """Direct preference optimisation (arXiv:2305.18290). beta: how dear it is to leave the reference.

    label_smoothing: how many of the pairs are thought to be the wrong way round. loss "ipo" asks for a margin of
    1 / (2 beta) a token instead (arXiv:2310.12036).
    """

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    label_smoothing: Below = 0.0
    loss: Literal["sigmoid", "ipo"] = "sigmoid"


@config
class DenseDPOConfig:
    """RLHF-V (arXiv:2312.00849): tokens of what was corrected count `gamma` times.

    average: divide an answer's score by the weights of its tokens, as the paper does; its code comes without and
    with a gamma of 1.1 and a beta of 0.1.
    """

    kind: Literal["dense-dpo"] = "dense-dpo"
    beta: PositiveFloat = 0.5
    gamma: PositiveFloat = 5.0
    average: bool = True


@config
class KTOConfig:
    """Kahneman-Tversky optimisation (arXiv:2402.01306): single answers, each good or bad, and what either weighs."""

    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1
    desirable: PositiveFloat = 1.0
    undesirable: PositiveFloat = 1.0


@config
class ORPOConfig:
    """Odds ratios (arXiv:2403.07691) beside learning the chosen answer; beta is the paper's lambda. No reference."""

    kind: Literal["orpo"] = "orpo"
    beta: PositiveFloat = 0.1


@config
class RewardConfig:
    """A reward model by Bradley and Terry; center weighs the square of a pair's sum, which keeps rewards near zero.

    asks: a question about the answer that follows it, after which the reward is read; `{}` in it stands for what is
    known of the picture (`Sample.facts`), which no policy reads (factual augmentation, arXiv:2309.14525).
    """

    kind: Literal["reward"] = "reward"
    center: NonNegativeFloat = 0.0
    asks: str = ""


def _truth() -> dict[str, float]:
    return {"truth": 1.0}


def check_rewards(kind: str, rewards: Mapping[str, float]) -> None:
    """ConfigError where answers earn nothing, or something that is not a number."""
    if not rewards:
        raise ConfigError(f"objective {kind!r} has no rewards, expected their names with their weights")
    for name, weight in rewards.items():
        if not math.isfinite(weight):
            raise ConfigError(f"objective {kind!r}: reward {name!r} weighs {weight}, expected a number")


@config
class PPOConfig:
    """Proximal policy optimisation (arXiv:1707.06347) of sampled answers, a reward at each one's end.

    rewards: what an answer is paid for, with weights: names of `rewards.REWARDS`, of a stage that learned a reward
    model, of a folder with one. kl: what a token costs by which it leaves the reference; one_sided: only where it
    became likelier. whiten: divide what tokens are paid by its spread over the step; scale: multiply it. updates: how
    often each batch of answers is learned from.
    """

    kind: Literal["ppo"] = "ppo"
    rewards: dict[str, float] = field(default_factory=_truth)
    kl: NonNegativeFloat = 0.1
    one_sided: bool = False
    whiten: bool = False
    scale: PositiveFloat = 1.0
    clip: PositiveFloat = 0.2
    value_clip: PositiveFloat = 0.2
    value_weight: NonNegativeFloat = 0.1
    discount: Share = 1.0  # gamma
    trace: Share = 0.95  # lambda of generalised advantages (arXiv:1506.02438)
    updates: PositiveInt = 2
    max_new_tokens: PositiveInt = 64

    def __post_init__(self) -> None:
        check_rewards(self.kind, self.rewards)


@config
class GRPOConfig:
    """Group-relative policy optimisation (arXiv:2402.03300): an answer is as good as it beats its prompt's others.

    rewards: as of `PPOConfig`.
    """

    kind: Literal["grpo"] = "grpo"
    rewards: dict[str, float] = field(default_factory=_truth)
    group: Annotated[int, Field(ge=2)] = 8  # answers to each prompt
    kl: NonNegativeFloat = 0.04
    clip: PositiveFloat = 0.2
    updates: PositiveInt = 1
    max_new_tokens: PositiveInt = 64

    def __post_init__(self) -> None:
        check_rewards(self.kind, self.rewards)


ObjectiveConfig = (
    CLIPConfig
    | RepresentationConfig
    | DINOConfig
    | BoxesConfig
    | DPOConfig
    | DenseDPOConfig
    | KTOConfig
    | ORPOConfig
    | RewardConfig
    | PPOConfig
    | GRPOConfig
)  # told apart by `kind`

DEFAULTS: dict[str, Any] = {made.kind: made for made in (kind() for kind in get_args(ObjectiveConfig))}

# what a batch of each objective holds: pictures alone, conversations, or prompts with answers of known worth, which
# come as pairs of a better and a worse one, each judged alone, or as prompts that the model answers itself
READS = {
    **dict.fromkeys(("next-token", "answers", "box-head"), "conversations"),
    **dict.fromkeys(("siglip", "clip", "itm", "qformer", "dino", "dense", "words", "boxes"), "pictures"),
    **dict.fromkeys(("dpo", "dense-dpo", "orpo", "reward"), "pairs"),
    "kto": "judged",
    **dict.fromkeys(("ppo", "grpo"), "prompts"),
}
COMPARES = {"siglip", "clip", "itm", "qformer", "kto"}  # those that hold samples of a micro-batch against each other
GATHERED = COMPARES - {"kto"}  # of those the ones that do so over all processes with a part of the micro-batch
PREPARES = {"dino", "ppo", "grpo"}  # those that run a model before each step, for what the step learns from
FROM_PAIRS = ("pairs", "judged", "prompts")  # all of them made of samples with a chosen and a rejected answer
REFERRED = {"dpo", "dense-dpo", "kto", "ppo", "grpo"}  # those that hold a model to what it was as its stage began
SAMPLED = {"ppo", "grpo"}  # those that learn from answers that the model samples itself


def check_names(names: Iterable[str]) -> None:
    """ConfigError, telling the nearest, for an objective that there is not."""
    for name in names:
        if name not in READS:
            raise ConfigError(f"unknown objective {name!r}{nearest(name, READS)}")
