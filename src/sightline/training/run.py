"""A whole run: the stages of a recipe one after the other in one folder, from the weights of the stage before."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from ..core.config import load_yaml, nearest
from ..core.errors import CheckpointError, ConfigError, DataError
from ..core.sequence import Text
from ..data.processor import Processor
from ..grounding.codecs import LocationTokens
from ..language.tokenizer import Tokenizer, train_tokenizer
from ..layers.adapted import merge
from ..model import VLM
from ..worlds.scene_questions import questions
from ..worlds.scenes import COLORS, SHAPES, SIZES, TEXTURES, scene
from ..zoo.families import ROWS, habits_of
from ..zoo.hollow import hollow
from ..zoo.own import ProcessorConfig
from . import checkpoints, distributed
from .adapters import adapt
from .alignment import Words, smooth_places, words_of
from .answers import Reference
from .boxes import Boxes
from .contrast import CLIP, Matching
from .distill import DINO
from .features import FeatureStore
from .judging import Judge, is_judge, load_judge, with_head
from .loader import Share, check_seen, length_of
from .located import Located
from .objectives import Dense, NextToken, Objective, SigLIP, Total
from .optim import tables_of
from .policy import GRPO, PPO
from .preferring import DPO, KTO, ORPO, DenseDPO, Reward
from .recipe import Recipe, Stage, check_files, learning_rates
from .records import prepare, tell, whole
from .reference import frozen
from .report import write_report
from .representation import Representation
from .rewards import REWARDS, Rewards, Weighted
from .settings import check_names
from .sharding import check_shards
from .sources import FilesSource
from .starting import load_start, starting_tokenizer, still_to_give
from .tensor_parallel import check_tensor_parallel
from .trainer import Step, Trainer

CONTROLS = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>", *LocationTokens().names)
VALUES = {"color": COLORS, "shape": SHAPES, "size": SIZES, "texture": TEXTURES}
TOKENIZER_SCENES = range(5_000_000, 5_006_000)
TOKENIZER_ROWS = 2_000  # of each file


def scenes_text() -> Iterator[str]:
    """Captions, questions and answers that a vocabulary is learned from."""
    for seed in TOKENIZER_SCENES:
        picture, rng = scene(seed), random.Random(seed)
        yield picture.caption(rng)
        for question in questions(picture, rng, 12):
            yield question.text
            yield f" {question.answer}"


def vocabulary_text(recipe: Recipe) -> Iterator[str]:
    """What a vocabulary is learned from: the words of scenes, and of the first rows of every file."""
    files = [source for source in recipe.sources.values() if isinstance(source, FilesSource)]
    if len(files) < len(recipe.sources):
        yield from scenes_text()
    for source in files:
        for row in range(min(len(source.reader), TOKENIZER_ROWS) if source.path else 0):
            with suppress(DataError):
                found = source.reader[row]
                said = (*found.conversation, found.chosen, found.rejected)
                yield from (part.text for each in said if each for part in each.parts if isinstance(part, Text))


def tokenizer_of(recipe: Recipe, folder: Path) -> Tokenizer:
    """The run's tokenizer; learned once and kept in its folder."""
    place = folder / "tokenizer"
    if not (place / "tokenizer.json").exists() and (found := starting_tokenizer(recipe)):
        whole(place, found.save)
    if not (place / "tokenizer.json").exists():
        if recipe.vocabulary > recipe.model.decoder.vocab_size:
            most = recipe.model.decoder.vocab_size
            raise ConfigError(f"a vocabulary of {recipe.vocabulary} does not fit a decoder's table of {most}")
        learned = train_tokenizer(
            vocabulary_text(recipe), recipe.vocabulary, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>"
        )
        whole(place, learned.save)
    return Tokenizer.from_folder(place)


def processor_of(recipe: Recipe, tokenizer: Tokenizer, model: VLM, stage: Stage | None = None) -> Processor:
    """What turns the conversations of a recipe, or of one of its stages, into numbers."""
    return processor_config(recipe, stage).build(tokenizer, model)


def processor_config(recipe: Recipe, stage: Stage | None = None) -> ProcessorConfig:
    """What a model folder says of its processor."""
    own = None if stage is None else stage.template
    template, codec, image = own or recipe.template, recipe.codec, "<image>"
    if template in ROWS:
        habits = habits_of(ROWS[template])
        codec, image = habits.codec if own else codec, habits.image
    return ProcessorConfig(recipe.pixels, template, codec, image, recipe.max_length)


def objective_of(
    stage: Stage, recipe: Recipe, tokenizer: Tokenizer, model: VLM, rewards: Mapping[str, Rewards] | None = None
) -> Total:
    """The terms that a stage names; the model is as the stage finds it. rewards: by name, besides `REWARDS`."""
    check_names(stage.terms)
    features, width = recipe.model.image.features, recipe.model.decoder.width
    text, places = (recipe.model.decoder.vocab_size, tokenizer.filler), (0, 0)
    if recipe.codec == "location-tokens":
        places = tokenizer.control(LocationTokens().name(0)), LocationTokens().bins

    def reference() -> Reference:
        return frozen(model, learning_rates(model, stage.learn))

    def processor() -> Processor:
        return processor_of(recipe, tokenizer, model, stage)

    def paid() -> Rewards:
        return Weighted(REWARDS | dict(rewards or {}), stage.rewards)

    made: dict[str, Callable[[], Objective]] = {
        "next-token": lambda: NextToken(*places, sources=stage.loss_weights),
        "answers": lambda: NextToken(*places, by_answer=True, sources=stage.loss_weights),
        "siglip": lambda: SigLIP(features, *text),
        "clip": lambda: CLIP(features, *text, stage.settings("clip")),
        "itm": lambda: Matching(model, *text),
        "qformer": lambda: Representation(model, *text, stage.settings("qformer")),
        "dino": lambda: DINO(model.encoder, stage.settings("dino")),
        "dense": lambda: Dense(features, {name: len(values) for name, values in VALUES.items()}),
        "boxes": lambda: Boxes(features, stage.settings("boxes")),
        "box-head": Located,
        "words": lambda: Words(words_of(tokenizer, VALUES), *places),
        "dpo": lambda: DPO(stage.settings("dpo"), reference()),
        "dense-dpo": lambda: DenseDPO(stage.settings("dense-dpo"), reference()),
        "kto": lambda: KTO(stage.settings("kto"), reference()),
        "orpo": lambda: ORPO(stage.settings("orpo")),
        "reward": lambda: Reward(stage.settings("reward"), width),
        "ppo": lambda: PPO(stage.settings("ppo"), processor(), reference(), width, paid()),
        "grpo": lambda: GRPO(stage.settings("grpo"), processor(), reference(), paid()),
    }
    return Total({name: made[name]() for name in stage.terms}, stage.terms)


def initial_model(recipe: Recipe) -> VLM:
    """A model drawn from the recipe's seed, its place tokens in order where it has some."""
    torch.manual_seed(recipe.seed)
    model = VLM(recipe.model)
    if recipe.codec == "location-tokens":
        places = LocationTokens()
        smooth_places(model.decoder.embedding.weight, CONTROLS.index(places.name(0)), places.bins)
    return model


def finished(recipe: Recipe, folder: Path, stage: Stage) -> bool:
    """Whether a stage's last step is in the folder, whole."""
    return last_of(folder, stage) is not None


def last_of(folder: Path, stage: Stage) -> checkpoints.Saved | None:
    """The checkpoint of a stage's last step, where it is there and whole."""

    def strange(state: dict[str, Any]) -> str:
        return "" if state.get("stage") == stage.name else f"stage {state.get('stage')}"

    found = checkpoints.newest(folder / "checkpoints" / stage.name, tell, strange)
    return found if found is not None and found.state["step"] >= stage.steps else None


def weights_before(recipe: Recipe, folder: Path, number: int, model: VLM) -> None:
    """Start a stage from the last weights of the one it comes after, the first of a run from where the recipe says."""
    before = recipe.stages[recipe.path(number)[-2]] if number else None
    if before and (found := last_of(folder, before)):
        restore(model, before, found)
        merge(model)
    elif recipe.start and (before is None or isinstance(recipe.start, str)):
        load_start(recipe, model)
    elif before:
        after = recipe.stages[number].name
        raise CheckpointError(f"{folder}: stage {before.name!r} is not finished; train it before {after!r}")


def begins(recipe: Recipe, folder: Path, number: int) -> bool:
    """Whether a stage has still to begin from what the recipe starts from, and not from the stage before it."""
    if finished(recipe, folder, recipe.stages[number]):
        return False
    if number == 0 or not isinstance(recipe.start, str):
        return number == 0
    return not finished(recipe, folder, recipe.stages[recipe.path(number)[-2]])


def restore(model: VLM, stage: Stage, found: checkpoints.Saved) -> None:
    """Give a model the weights and adapters of a stage's checkpoint."""
    adapt(model, stage.learn)
    model.load_state_dict(found.tensors["model"])


def judges_of(recipe: Recipe, folder: Path, number: int, given: Mapping[str, Rewards]) -> dict[str, Rewards]:
    """The rewards that a stage names and that are no usual ones: those given, and reward models, by name."""
    judges: dict[str, Rewards] = {}
    for name in recipe.stages[number].rewards:
        if name in given:
            judges[name] = given[name]
        elif name not in REWARDS:
            judges[name] = judge_of(recipe, folder, number, name)
    return judges


def judge_of(recipe: Recipe, folder: Path, number: int, name: str) -> Judge:
    """The reward model that a stage means by a name: an earlier stage's, or what lies in a folder."""
    if name in reward_stages(recipe, number):
        return stage_judge(recipe, folder, recipe.stage(name))
    if is_judge(Path(name)):
        return load_judge(Path(name))
    other = load_yaml(Recipe, Path(name) / "run.yaml")
    found = [n for n in reward_stages(other) if finished(other, Path(name), other.stages[other.stage(n)])]
    if not found:
        raise CheckpointError(f"{name}: no stage of the run in it has learned a reward model to its end")
    return stage_judge(other, Path(name), other.stage(found[-1]))


def stage_judge(recipe: Recipe, folder: Path, number: int) -> Judge:
    """The reward model that a stage of a run has learned, its adapters beside the weights that they leave alone."""
    stage = recipe.stages[number]
    if (found := last_of(folder, stage)) is None:
        raise CheckpointError(f"{folder}: stage {stage.name!r} is not finished; train the reward model first")
    model = initial_model(recipe)
    restore(model, stage, found)
    reward = with_head(head_of(found), stage.settings("reward"), model, found.path)
    return Judge(model, reward, processor_of(recipe, tokenizer_of(recipe, folder), model, stage))


def head_of(found: checkpoints.Saved) -> dict[str, torch.Tensor]:
    """The head of a reward model in the checkpoint of its stage."""
    prefix = "terms.reward.head."
    own = found.tensors["objective"].items()
    return {name.removeprefix(prefix): value for name, value in own if name.startswith(prefix)}


def reward_stages(recipe: Recipe, before: int | None = None) -> list[str]:
    """The stages, or those before one, that learn a reward model."""
    return [stage.name for stage in recipe.stages[:before] if "reward" in stage.terms]


def check_rewards(recipe: Recipe, number: int, given: Mapping[str, Rewards]) -> None:
    """ConfigError for a reward that a stage names and that is nowhere."""
    stage = recipe.stages[number]
    known = [*REWARDS, *given, *reward_stages(recipe, number)]
    for name in stage.rewards:
        folder = Path(name)
        if name not in known and not is_judge(folder) and not (folder / "run.yaml").is_file():
            ways = "a reward, an earlier stage that learns one, or a folder with a reward model"
            raise ConfigError(f"stage {stage.name!r}: {name!r} is not {ways}{nearest(name, known)}")


def check_learned(recipe: Recipe, stage: Stage) -> None:
    """ConfigError for a stage whose patterns name nothing, or nothing that its samples reach."""
    with hollow():
        model = VLM(recipe.model)
        adapt(model, stage.learn)
    if stage.trainable_tokens and not tables_of(learning_rates(model, stage.learn)):
        raise ConfigError(f"stage {stage.name!r} has trainable_tokens, but no table of words learns")
    check_seen(stage, recipe.sources, model)


def check(
    recipe: Recipe,
    folder: Path,
    chosen: Iterable[int],
    rewards: Mapping[str, Rewards],
    shard: bool,
    tensor_parallel: int,
) -> None:
    """ConfigError for what any of the chosen stages cannot have, before the first begins and anything is written."""
    groups = distributed.Groups(tensor_parallel)
    besides = still_to_give(recipe)
    for number in chosen:
        stage = recipe.stages[number]
        told = besides if besides and begins(recipe, folder, number) else ""
        check_files(stage, recipe.sources, told)
        processor_config(recipe, stage)
        for name in stage.reads:
            length_of(name, recipe.sources[name])  # which opens its file
        check_rewards(recipe, number, rewards)
        check_learned(recipe, stage)
        check_tensor_parallel(recipe.model, stage, tensor_parallel, distributed.size(), shard)
        Share(groups.rank, groups.size).check(stage)
        if shard:
            check_shards(stage)


def run(
    recipe: Recipe,
    folder: Path,
    stage: str | None = None,
    device: str = "cpu",
    workers: int = 1,
    evaluate: Callable[[VLM], dict[str, float]] | None = None,
    shard: bool = False,
    store: FeatureStore | None = None,
    rewards: Mapping[str, Rewards] | None = None,
    tensor_parallel: int = 1,
) -> Iterator[Step]:
    """Steps of one stage, or of every stage that is not finished; killed at any instant, it goes on from there.

    Within `distributed.joined` several processes are one run, in one folder that all of them see. shard: each keeps a
    part of every weight only. store: features that several runs share, whether samples repeat within one or not.
    rewards: functions that stages may name as what their answers are paid for. tensor_parallel: how many processes,
    side by side, compute each block of the decoder together.
    """
    chosen = range(len(recipe.stages)) if stage is None else [recipe.stage(stage)]
    if not chosen:
        raise ConfigError(f"recipe {recipe.name!r} has no stages, expected one at least")
    check(recipe, folder, chosen, rewards or {}, shard, tensor_parallel)
    if shard and (evaluate is not None or not distributed.started()):
        raise ConfigError("shards are of several processes, which torchrun starts, and cannot be evaluated on the way")
    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(checkpoints.locked(folder))
            prepare(recipe, folder)
            tokenizer_of(recipe, folder)

        distributed.led(begin)
        tokenizer = tokenizer_of(recipe, folder)
        for number in chosen:
            current = recipe.stages[number]
            if finished(recipe, folder, current):
                continue
            judges = judges_of(recipe, folder, number, rewards or {})
            model = initial_model(recipe)
            weights_before(recipe, folder, number, model)
            model.to(device)
            torch.manual_seed(recipe.seed + number)
            adapt(model, current.learn)  # before a reference copies what the stage begins from
            for judge in judges.values():
                if isinstance(judge, Judge):
                    judge.share(model, learning_rates(model, current.learn))
                    judge.to(device)
            objective = objective_of(current, recipe, tokenizer, model, judges).to(device)
            rows = [tokenizer.control(name) for name in current.trainable_tokens]
            trainer = Trainer(recipe, current, model, objective, folder, shard, store, tensor_parallel, rows)
            if trainer.resume():
                tell(f"stage {current.name!r} goes on from step {trainer.step:,}")
            yield from trainer.run(processor_of(recipe, tokenizer, model, current), workers, evaluate)
            if distributed.first():
                try:
                    write_report(folder, recipe.name)
                except OSError as error:
                    tell(f"{error.filename}: {error.strerror}; the run goes on without its report")


def final_model(recipe: Recipe, folder: Path) -> tuple[VLM, tuple[Stage, ...]]:
    """The model after the last stage that is finished, with that one's adapters, and the stages it went through."""
    model = initial_model(recipe)
    for number, stage in reversed(list(enumerate(recipe.stages))):
        if found := last_of(folder, stage):
            restore(model, stage, found)
            return model.eval(), tuple(recipe.stages[k] for k in recipe.path(number))
    raise CheckpointError(f"{folder}: no stage of recipe {recipe.name!r} is finished")
