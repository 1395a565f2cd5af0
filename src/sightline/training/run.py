"""A whole run: the stages of a recipe one after the other in one folder, from the weights of the stage before."""

import fnmatch
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from ..core.errors import CheckpointError, ConfigError, DataError
from ..core.sequence import Text
from ..data.processor import Processor
from ..grounding.codecs import LocationTokens
from ..language.tokenizer import Tokenizer, train_tokenizer
from ..layers.adapted import merge
from ..model import VLM
from ..worlds.scene_questions import questions
from ..worlds.scenes import COLORS, SHAPES, SIZES, TEXTURES, scene
from ..zoo.names import locate
from ..zoo.own import ProcessorConfig, load_model, read_card
from . import checkpoints, distributed
from .adapters import adapt
from .alignment import Words, smooth_places, words_of
from .answers import Reference
from .boxes import Boxes
from .contrast import CLIP, Matching
from .distill import DINO
from .features import FeatureStore
from .loader import Share
from .located import Located
from .objectives import Dense, NextToken, Objective, SigLIP, Total
from .policy import GRPO, PPO
from .preferring import DPO, KTO, ORPO, DenseDPO, Reward
from .recipe import Recipe, Stage, check_files, learning_rates
from .records import prepare, tell, whole
from .reference import frozen
from .report import write_report
from .settings import check_names
from .sharding import check_shards
from .sources import FilesSource
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
    if not (place / "tokenizer.json").exists() and recipe.start:
        whole(place, Tokenizer.from_folder(locate(recipe.start)).save)
    if not (place / "tokenizer.json").exists():
        if recipe.vocabulary > recipe.model.decoder.vocab_size:
            most = recipe.model.decoder.vocab_size
            raise ConfigError(f"a vocabulary of {recipe.vocabulary} does not fit a decoder's table of {most}")
        learned = train_tokenizer(
            vocabulary_text(recipe), recipe.vocabulary, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>"
        )
        whole(place, learned.save)
    return Tokenizer.from_folder(place)


def processor_of(recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> Processor:
    """What turns the recipe's conversations into numbers."""
    return processor_config(recipe).build(tokenizer, model)


def processor_config(recipe: Recipe) -> ProcessorConfig:
    """What a model folder says of its processor."""
    return ProcessorConfig(recipe.pixels, recipe.template, recipe.codec, max_length=recipe.max_length)


def objective_of(stage: Stage, recipe: Recipe, tokenizer: Tokenizer, model: VLM) -> Total:
    """The terms that a stage names; the model is as the stage finds it."""
    check_names(stage.terms)
    features, first = recipe.model.image.features, tokenizer.control(LocationTokens().name(0))
    width, text = recipe.model.decoder.width, (recipe.model.decoder.vocab_size, tokenizer.control(tokenizer.pad))

    def reference() -> Reference:
        return frozen(model, learning_rates(model, stage.learn))

    def processor() -> Processor:
        return processor_of(recipe, tokenizer, model)

    made: dict[str, Callable[[], Objective]] = {
        "next-token": lambda: NextToken(first, LocationTokens().bins),
        "answers": lambda: NextToken(first, LocationTokens().bins, by_answer=True),
        "siglip": lambda: SigLIP(features, *text),
        "clip": lambda: CLIP(features, *text, stage.settings("clip")),
        "itm": lambda: Matching(model, *text),
        "dino": lambda: DINO(model.encoder, stage.settings("dino")),
        "dense": lambda: Dense(features, {name: len(values) for name, values in VALUES.items()}),
        "boxes": lambda: Boxes(features, stage.settings("boxes")),
        "box-head": Located,
        "words": lambda: Words(words_of(tokenizer, VALUES), first, LocationTokens().bins),
        "dpo": lambda: DPO(stage.settings("dpo"), reference()),
        "dense-dpo": lambda: DenseDPO(stage.settings("dense-dpo"), reference()),
        "kto": lambda: KTO(stage.settings("kto"), reference()),
        "orpo": lambda: ORPO(stage.settings("orpo")),
        "reward": lambda: Reward(stage.settings("reward"), width),
        "ppo": lambda: PPO(stage.settings("ppo"), processor(), reference(), width),
        "grpo": lambda: GRPO(stage.settings("grpo"), processor(), reference()),
    }
    return Total({name: made[name]() for name in stage.terms}, stage.terms)


def initial_model(recipe: Recipe) -> VLM:
    """A model drawn from the recipe's seed, its place tokens in order."""
    torch.manual_seed(recipe.seed)
    model = VLM(recipe.model)
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
    """Start a stage from the last weights of the one before it, the first one of a run from where the recipe says."""
    before = recipe.stages[number - 1] if number else None
    if before and (found := last_of(folder, before)):
        restore(model, before, found)
        merge(model)
    elif recipe.start:
        load_start(recipe, model)
    elif before:
        after = recipe.stages[number].name
        raise CheckpointError(f"{folder}: stage {before.name!r} is not finished; train it before {after!r}")


def restore(model: VLM, stage: Stage, found: checkpoints.Saved) -> None:
    """Give a model the weights and adapters of a stage's checkpoint."""
    adapt(model, stage.learn)
    model.load_state_dict(found.tensors["model"])


def load_start(recipe: Recipe, model: VLM) -> None:
    """Give a model what the recipe takes of the folder that it starts from; that must be of the same design."""
    folder = locate(recipe.start)
    if recipe.taken == ("*",) and read_card(folder).model != recipe.model:
        raise ConfigError(f"{folder}: the model in it is of another design than recipe {recipe.name!r}")
    weights, own = load_model(folder).state_dict(), model.state_dict()
    for pattern in recipe.taken:
        chosen = fnmatch.filter(own, pattern)
        strange = [name for name in chosen if name not in weights or weights[name].shape != own[name].shape]
        if strange or not chosen:
            what = f"{strange[0]!r} in it" if strange else f"a parameter that {pattern!r} names"
            raise ConfigError(f"{folder}: there is no {what} as recipe {recipe.name!r} has it")
        model.load_state_dict({name: weights[name] for name in chosen}, strict=False)


def run(
    recipe: Recipe,
    folder: Path,
    stage: str | None = None,
    device: str = "cpu",
    workers: int = 1,
    evaluate: Callable[[VLM], dict[str, float]] | None = None,
    shard: bool = False,
    store: FeatureStore | None = None,
    tensor_parallel: int = 1,
) -> Iterator[Step]:
    """Steps of one stage, or of every stage that is not finished; killed at any instant, it goes on from there.

    Within `distributed.joined` several processes are one run, in one folder that all of them see. shard: each keeps a
    part of every weight only. store: features that several runs share, whether samples repeat within one or not.
    tensor_parallel: how many processes, side by side, compute each block of the decoder together.
    """
    chosen = range(len(recipe.stages)) if stage is None else [recipe.stage(stage)]
    groups = distributed.Groups(tensor_parallel)
    for number in chosen:
        check_files(recipe.stages[number], recipe.sources)
        check_tensor_parallel(recipe.model, recipe.stages[number], tensor_parallel, distributed.size(), shard)
        Share(groups.rank, groups.size).check(recipe.stages[number])
        if shard:
            check_shards(recipe.stages[number])
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
            model = initial_model(recipe)
            weights_before(recipe, folder, number, model)
            model.to(device)
            torch.manual_seed(recipe.seed + number)
            adapt(model, current.learn)  # before a reference copies what the stage begins from
            objective = objective_of(current, recipe, tokenizer, model)
            trainer = Trainer(recipe, current, model, objective.to(device), folder, shard, store, tensor_parallel)
            trainer.resume()
            yield from trainer.run(processor_of(recipe, tokenizer, model), workers, evaluate)
            if distributed.first():
                write_report(folder, recipe.name)


def final_model(recipe: Recipe, folder: Path) -> tuple[VLM, tuple[Stage, ...]]:
    """The model after the last stage that is finished, with that one's adapters, and the stages it went through."""
    model = initial_model(recipe)
    for number, stage in reversed(list(enumerate(recipe.stages))):
        if found := last_of(folder, stage):
            restore(model, stage, found)
            return model.eval(), recipe.stages[: number + 1]
    raise CheckpointError(f"{folder}: no stage of recipe {recipe.name!r} is finished")
