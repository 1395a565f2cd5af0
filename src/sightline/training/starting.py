"""What a run begins from: one model folder, or folders of the parts that a model was put together from.

A part is read by its own `config.json`, whoever published it. All that its weights hang on must be as the recipe has
it; which layer features are taken from, the size of pictures, and how many words there are may differ.
"""

import fnmatch
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError, ConfigError, SightlineError
from ..encoders.vit import ViT, ViTConfig
from ..fusion.visual_expert import ExpertBlock
from ..language.decoder import Decoder, DecoderConfig, SelfBlock
from ..language.seq2seq import Seq2Seq, Seq2SeqConfig
from ..language.tokenizer import Tokenizer
from ..model import VLM, VLMConfig
from ..zoo.checkpoint import read_json
from ..zoo.families import FAMILIES, ROWS, family_of, kind_of
from ..zoo.hollow import hollow
from ..zoo.names import locate
from ..zoo.own import is_own, load_model
from ..zoo.published import load_published
from .adapters import nearest_pattern
from .recipe import Parts, Recipe

PARTS = ("encoder", "fusion", "decoder")
WHOLE = ("image", "fusion", "decoder")  # what the settings of a model call them
ALONE: dict[str, tuple[type[nn.Module], ...]] = {"encoder": (ViT,), "decoder": (Decoder, Seq2Seq)}
SEEN = {"layer", "normed", "l2_norm", "keep_prefix", "image_size", "position_grid", "eps"}  # how an encoder is used
LEFT_OUT = {"class_token", "final_norm"}  # what an encoder may have that the recipe's does without
SAID = {"vocab_size", "max_length", "rope_scaling", "unwritten"}  # how many words there are, and how far a text goes
TABLES = ("embedding.weight", "head.weight")  # a row for each word


# ------------------------------------------------------------------------------------------------ what is still missing


def given(start: Parts) -> dict[str, str]:
    """The parts that come from folders, by name."""
    return {each.name: found for each in fields(start) if (found := str(getattr(start, each.name)))}


def missing(recipe: Recipe) -> dict[str, str]:
    """What a recipe begins from that is no folder here, by the key that gives it."""
    start = recipe.start
    named = {"start": start} if isinstance(start, str) else {f"start.{k}": v for k, v in given(start).items()}
    return {key: name for key, name in named.items() if name and not _is_here(name)}


def still_to_give(recipe: Recipe) -> str:
    """The same as a line that says how each is given; "" where nothing is missing."""
    absent = missing(recipe)
    if not absent:
        return ""
    if "start" in absent:
        return f"the model that recipe {recipe.name!r} begins from is not here; set start=FOLDER ({absent['start']})"
    ways = ", ".join(f"{key}=FOLDER ({name})" for key, name in absent.items())
    return f"parts that recipe {recipe.name!r} begins from are not here; set {ways}"


def _is_here(name: str) -> bool:
    try:
        return locate(name).is_dir()
    except SightlineError:
        return False


# ------------------------------------------------------------------------------------------------------------ tokenizer


def starting_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer of what a recipe begins from, with the tokens that it adds; None where one is to be learned."""
    start = recipe.start
    name = start if isinstance(start, str) else start.tokenizer or start.decoder
    if not name:
        return None
    folder = locate(name)
    found = Tokenizer.from_folder(folder) if is_own(folder) else _published_tokenizer(recipe, folder)
    found = found.extended(recipe.added_tokens)
    if not found.pad:
        found.pad = next((token for token in recipe.added_tokens if "pad" in token.lower()), "")
    if (rows := recipe.model.decoder.total_vocab) < found.following:
        raise ConfigError(f"{folder}: a tokenizer of {found.following} ids, the decoder of {recipe.name!r} has {rows}")
    return found


def _published_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    """As the family reads it whose conversations the recipe has, and else as the folder's own does."""
    kind = kind_of(ROWS[recipe.template]) if recipe.template in ROWS else ""
    found = FAMILIES[kind or family_of(read_json(folder / "config.json"))].tokenizer(folder)
    if found is None:
        raise CheckpointError(f"{folder}: no tokenizer.json, expected the files of a tokenizer")
    return found


# -------------------------------------------------------------------------------------------------------------- weights


def load_start(recipe: Recipe, model: VLM) -> None:
    """Give a model what its recipe begins from; ConfigError tells the first thing that contradicts the recipe."""
    if isinstance(recipe.start, str):
        _load_whole(recipe, model, locate(recipe.start))
        return
    for part, name in given(recipe.start).items():
        if part in PARTS:
            _load_part(recipe, model, part, locate(name))
    if recipe.start.decoder and not recipe.start.fusion:
        for block in model.decoder.blocks:
            if isinstance(block, ExpertBlock):
                block.begin()


def _opened(folder: Path) -> nn.Module:
    """The model of a folder, this project's or a published one."""
    return load_model(folder) if is_own(folder) else load_published(folder).model


def _load_whole(recipe: Recipe, model: VLM, folder: Path) -> None:
    """What the recipe takes from one folder; all of it is of the same design, but for the size of pictures."""
    found = _opened(folder)
    if not isinstance(found, VLM):
        raise ConfigError(f"{folder}: a part of a model; give it as one, such as start={{decoder: {folder}}}")
    theirs, ours = _plain(found.config, recipe.model), _plain(recipe.model, recipe.model)
    if recipe.taken == ("*",) and theirs != ours:
        told = [
            f"{part}: {why}" for part in WHOLE if (why := contradiction(getattr(ours, part), getattr(theirs, part)))
        ]
        why = f" ({told[0]})" if told else ""
        raise ConfigError(f"{folder}: the model in it is of another design than recipe {recipe.name!r}{why}")
    weights, own = {**found.state_dict(), **_places(found, model)}, model.state_dict()
    for pattern in recipe.taken:
        chosen = fnmatch.filter(own, pattern)
        strange = [name for name in chosen if name not in weights or weights[name].shape != own[name].shape]
        if not chosen:
            near = nearest_pattern(pattern, own)
            raise ConfigError(f"recipe {recipe.name!r} takes {pattern!r}, which matches no parameter{near}")
        if strange:
            raise ConfigError(f"{folder}: there is no {strange[0]!r} in it as recipe {recipe.name!r} has it")
        model.load_state_dict({name: weights[name] for name in chosen}, strict=False)


def _plain(found: VLMConfig, wanted: VLMConfig) -> VLMConfig:
    """A design with another's size of pictures and length of texts, which weights do not hang on, all numbers said."""
    image, decoder = found.image, _spelled(found.decoder)
    if (
        isinstance(image, ViTConfig)
        and isinstance(wanted.image, ViTConfig)
        and image.patch_size == wanted.image.patch_size
    ):
        image = replace(image, image_size=wanted.image.image_size)
    if getattr(decoder, "positions", "") != "learned":
        decoder = replace(decoder, max_length=wanted.decoder.max_length)
    return replace(found, image=image, decoder=decoder)


def _places(found: VLM, model: VLM) -> dict[str, Tensor]:
    """The encoder's table of positions at the model's size of pictures, where it has to be resized."""
    theirs, ours = found.encoder, model.encoder
    if not isinstance(theirs, ViT) or not isinstance(ours, ViT):
        return {}
    table = resized(theirs, ours.config)
    return {} if table is None else {"encoder.positions": table}


def resized(encoder: ViT, wanted: ViTConfig) -> Tensor | None:
    """An encoder's table of positions for other settings: bicubic for another grid, without the class token's row."""
    if encoder.positions is None:
        return None
    side, cfg = wanted.position_grid or wanted.grid, encoder.config
    head = int(cfg.class_token)
    table = encoder.positions
    if len(table) - head != side**2:
        same = encoder.position_table((1, side, side))
        assert same is not None
        table = same
    return table[head - int(wanted.class_token and cfg.class_token) :].detach()


def _load_part(recipe: Recipe, model: VLM, part: str, folder: Path) -> None:
    """One part from a folder of it alone, or of a whole model."""
    found = _opened(folder)
    theirs = getattr(found, part) if isinstance(found, VLM) else found
    if not isinstance(found, VLM) and not isinstance(found, ALONE.get(part, ())):
        raise ConfigError(f"{folder}: no {part} in it, expected a folder of one or of a whole model")
    ours = getattr(recipe.model, dict(zip(PARTS, WHOLE, strict=True))[part])
    if told := contradiction(ours, theirs.config):
        raise ConfigError(f"{folder}: its {part} is not that of recipe {recipe.name!r}: {told}")
    own, places = model.state_dict(), _targets(model, part)
    if isinstance(found, VLM):
        state = found.state_dict()
        weights = {name: state[place] for name, place in _targets(found, part).items()}
    else:
        weights = dict(found.state_dict())
    if isinstance(theirs, ViT) and (table := resized(theirs, ours)) is not None:
        weights["positions"] = table
    for name, place in places.items():
        target, source = own[place], weights.get(name)
        if source is not None and part == "decoder" and name in TABLES:
            source = grown(source, len(target))
        if source is None or source.shape != target.shape:
            size = "missing" if source is None else f"{list(source.shape)}, expected {list(target.shape)}"
            raise ConfigError(f"{folder}: its {part} is not that of recipe {recipe.name!r}: {name} is {size}")
        target.copy_(source)  # which the state shares with the model


def contradiction(ours: Any, theirs: Any) -> str:
    """The first setting of a part that is another than the recipe's, of those that weights hang on; "" if none is."""
    if type(ours) is not type(theirs):
        return f"its settings are {type(theirs).__name__}, expected {type(ours).__name__}"
    ours, theirs = _spelled(ours), _spelled(theirs)
    free = SAID if isinstance(ours, DecoderConfig | Seq2SeqConfig) else SEEN
    for each in fields(ours):
        wanted, found = getattr(ours, each.name), getattr(theirs, each.name)
        if wanted != found and each.name not in free and not (each.name in LEFT_OUT and found):
            return f"{each.name} is {found!r}, expected {wanted!r}"
    return ""


def _spelled(cfg: Any) -> Any:
    """A decoder's settings with every number said that follows from others."""
    if not isinstance(cfg, DecoderConfig):
        return cfg
    return replace(cfg, head_dim=cfg.head_size, kv_heads=cfg.kv_heads or cfg.heads)


def grown(table: Tensor, rows: int) -> Tensor:
    """A table of so many rows: the first of those that there are, new ones as the mean of all (Hewitt, 2021)."""
    if rows <= len(table):
        return table[:rows]
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat((table, mean.expand(rows - len(table), -1)))


def _words(decoder: nn.Module, settings: Any) -> dict[str, str]:
    """Names that a language model's weights have in a decoder, by those they have without what a fusion adds.

    settings: its own, which say what the language model alone has. A fusion's blocks may stand between its blocks.
    """
    with hollow():
        alone = Seq2Seq(settings) if isinstance(settings, Seq2SeqConfig) else Decoder(settings)
    blocks = getattr(decoder, "blocks", ())
    places = [i for i, block in enumerate(blocks) if isinstance(block, SelfBlock)]
    found = {}
    for name in alone.state_dict():
        first, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        found[name] = f"blocks.{places[int(number)]}.{inner}" if first == "blocks" and places else name
    return found


def _targets(model: VLM, part: str) -> dict[str, str]:
    """Full names of a part's weights in a model, by those that the part gives them."""
    if part == "encoder":
        return {name: f"encoder.{name}" for name in model.encoder.state_dict()}
    words = {name: f"decoder.{place}" for name, place in _words(model.decoder, model.config.decoder).items()}
    if part == "decoder":
        return words
    own = set(words.values())  # the fusion has all the rest of the decoder
    parts = [name for name in model.state_dict() if name.startswith(("fusion.", "decoder.")) and name not in own]
    return {name: name for name in parts}
