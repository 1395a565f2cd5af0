"""A published checkpoint by its folder: what `config.json` says it is, its weights, the inputs it is known by."""

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..core.config import explain, nearest
from ..core.errors import CheckpointError, InputError, SightlineError
from ..core.patches import Patches, patchify
from ..data.batch import Batch
from ..encoders.vit import ViT
from ..language.cache import Cache
from ..language.decoder import Decoder
from ..language.seq2seq import Seq2Seq
from ..layers.adapted import merged_state
from ..layers.packed import Precision
from ..model import VLM
from .blip2 import instructed
from .checkpoint import assign, read_json, write
from .configs import Json
from .families import FAMILIES, family_of
from .hollow import hollow
from .inputs import pictures
from .keymap import KeyMap
from .prepared import dtype_of, prepared


class Published:
    """A loaded checkpoint that answers the keyword inputs of its published model.

    model: a VLM, a bare Decoder or Seq2Seq, or a bare ViT. config: its `config.json`. precision: what it is run in.
    loaded_from: each parameter's source.
    """

    def __init__(
        self, model: nn.Module, config: Json, family: str, folder: Path, precision: Precision = "fp32"
    ) -> None:
        self.model, self.config, self.family, self.folder = model, config, family, folder
        self.precision: Precision = precision
        self.loaded_from = {name: str(folder) for name in model.state_dict()}
        self._runner: tuple[tuple[tuple[int, int], ...], nn.Module] | None = None

    @property
    def runner(self) -> nn.Module:
        """The model as it is run: packed for inference, and packed again after its weights have changed."""
        state = tuple((id(p), p._version) for p in self.model.parameters())
        if self._runner is None or self._runner[0] != state:
            self._runner = state, prepared(self.model, self.precision)
        return self._runner[1]

    @torch.inference_mode()
    def features(self, pixel_values: Tensor) -> Tensor:
        """Features [items, tokens, width] of a bare encoder or of a model's own."""
        runner = self.runner
        encoder = runner if isinstance(runner, ViT) else getattr(runner, "encoder", None)
        if not isinstance(encoder, ViT):
            raise InputError(f"a {self.family} model has no vision encoder")
        patches: Patches = encoder(patchify(pixel_values, encoder.config.patch_size))
        return patches.dense()

    @torch.inference_mode()
    def logits(self, **inputs: Tensor) -> Tensor:
        """Scores [batch, length, vocabulary] in float32 for inputs by their published names.

        input_ids [batch, length], already expanded; pixel_values [images, 3, height, width]; attention_mask and
        token_type_ids [batch, length] as the published model takes them; for a Q-Former that reads the question,
        InstructBLIP's or one of ours, qformer_input_ids and qformer_attention_mask [images, words]; for Kosmos-2
        image_embeds_position_mask [batch, length], 1 where a token is a picture's; for CogVLM images, a list of one
        picture [3, height, width] or none for each row; for LLaVA-NeXT pixel_values [images, views, 3, height, width]
        with image_sizes [images, 2]; for Aria pixel_mask [images, height, width], 1 where a picture is;
        decoder_input_ids [batch, length] for a model that writes beside what it reads. A model that looks at pictures
        from beside its sequence may take pixel_values [batch, pictures, 3, height, width], filled up to the row with
        most, together with image_attention_mask [batch, length, pictures]; OpenFlamingo and Otter have lang_x and
        vision_x in their place, Mllama has tiles and aspect_ratio_ids (`zoo.flamingo`, `zoo.mllama`). Qwen2-VL takes
        patches [n, width] of all pictures and of all films, pixel_values and pixel_values_videos, with image_grid_thw
        and video_grid_thw [items, 3] and for Qwen2.5-VL second_per_grid_ts [films]; Fuyu takes patches [batch, n,
        width].
        """
        batch, runner = self.batch(**inputs), self.runner
        if batch.source is not None and inputs.get("decoder_input_ids") is None:
            raise InputError(f"a {self.family} model needs decoder_input_ids")
        return self._writer(runner).logits(_read(runner, batch))

    @torch.inference_mode()
    def generate_ids(self, max_new_tokens: int, **inputs: Tensor) -> Tensor:
        """The greedy continuation [batch, at most max_new_tokens]; rows that ended are filled up with the end token."""
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        batch, runner = self.batch(**inputs), self.runner
        if not bool((batch.layout.document[:, -1] >= 0).all()):
            raise InputError("a prompt is padded on the right, expected padding on the left for generation")
        writer, length = self._writer(runner), batch.ids.shape[1]
        cache = writer.new_cache(min(length + max_new_tokens, max(length, writer.config.max_length)))
        hidden = _read(runner, batch, cache, torch.arange(length - 1, batch.ids.numel(), length))
        ends = self.ends()
        done = torch.zeros(len(batch.ids), dtype=torch.bool)
        written: list[Tensor] = []
        while True:
            chosen = writer.logits(hidden).argmax(-1)
            if ends:
                chosen = torch.where(done, ends[0], chosen)
                done |= torch.isin(chosen, torch.tensor(ends))
            written.append(chosen)
            if len(written) == max_new_tokens or bool(done.all()):
                return torch.stack(written, dim=1)
            assert cache.layout is not None
            step = Batch(chosen[:, None], cache.layout.next(), torch.zeros(0, dtype=torch.int64))
            hidden = _read(runner, step, cache)[:, -1]

    def save(self, folder: Path) -> None:
        """Write the model in its published layout, adapters merged, with its configuration as it was read."""
        keys = FAMILIES[self.family].keys(self.model.config)
        write(folder, keys.save(merged_state(self.model)), self.config)

    def batch(self, **inputs: Tensor | None) -> Batch:
        """The published inputs as a batch; InputError where pictures and their places do not match."""
        family = FAMILIES.get(self.family)  # of which our own models are none
        read: Callable[..., Batch] | None = self._own_inputs if family is None else family.inputs
        if read is None:
            raise InputError(f"a {self.family} model writes no text")
        taken = {name: given for name, given in inputs.items() if name in _keywords(read)}
        for name in (name for name in inputs if name not in taken):
            known = sorted({name for each in FAMILIES.values() if each.inputs for name in _keywords(each.inputs)})
            if name not in known:
                raise InputError(f"unknown input {name!r}{nearest(name, known)}")
            if inputs[name] is not None:
                raise InputError(f"a {self.family} model takes no {name}")
        return read(self.model, self.config, **taken)

    @property
    def _own_inputs(self) -> Callable[..., Batch]:
        """Inputs of a model of no published family: InstructBLIP's where its fusion reads the question too."""
        asked = isinstance(self.model, VLM) and self.model.config.instruction_length > 0
        return instructed if asked else pictures

    def _writer(self, runner: nn.Module) -> Decoder | Seq2Seq:
        writer = runner.decoder if isinstance(runner, VLM) else runner
        if not isinstance(writer, Decoder | Seq2Seq):
            raise InputError(f"a {self.family} model writes no text")
        return writer

    def ends(self) -> list[int]:
        """Ids that end an answer, from the generation settings or the configuration."""
        path = self.folder / "generation_config.json"
        settings = read_json(path) if path.exists() else {}
        found = settings.get("eos_token_id", self.config.get("eos_token_id"))
        if found is None:
            found = (self.config.get("text_config") or {}).get("eos_token_id")
        return [] if found is None else [found] if isinstance(found, int) else list(found)


def _read(runner: nn.Module, batch: Batch, cache: Cache | None = None, rows: Tensor | None = None) -> Tensor:
    """Hidden states of a VLM or a bare language model."""
    if isinstance(runner, VLM):
        return cast(Tensor, runner(batch, cache, None, rows))
    assert isinstance(runner, Decoder | Seq2Seq)
    memory = None
    if batch.source is not None and isinstance(runner, Seq2Seq):
        memory = runner.encode(runner.embed(batch.source.ids), batch.source.layout)
    return cast(Tensor, runner(runner.embed(batch.ids), batch.layout, memory, cache, rows))


def _keywords(read: Callable[..., Batch]) -> list[str]:
    """The published inputs that a function takes, after the model and its configuration."""
    return list(signature(read).parameters)[2:]


def build(family: str, c: Json, folder: Path) -> nn.Module:
    """The model that a configuration describes, without weights; CheckpointError where it describes none."""
    where = folder / "config.json"
    try:
        with hollow():
            return FAMILIES[family].build(c, folder)
    except SightlineError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{where}: the key {error} is missing") from None
    except ZeroDivisionError:
        raise CheckpointError(f"{where}: one of its sizes is 0, expected at least 1") from None
    except (ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{where}: its values describe no {family} model ({_first_line(error)[:120]})") from None


def load_published(folder: Path, precision: Precision = "fp32") -> Published:
    """Load a folder by its own `config.json`; CheckpointError or ConfigError tells what is wrong with it."""
    said = read_json(folder / "config.json")
    family = family_of(said)
    chosen = FAMILIES[family]
    c = chosen.complete(said, folder)
    model = build(family, c, folder)
    keys, found = chosen.keys(model.config), chosen.tensors(c, folder)
    try:
        assign(model, keys.load(found), dtype_of(precision), folder)
    except (CheckpointError, RuntimeError, ValueError) as error:  # tensors of other sizes cannot be cut as a map says
        told = _contradiction(model, keys, found, folder)
        if isinstance(error, CheckpointError) and not told:
            raise
        raise CheckpointError(told or f"{folder}: its weights are not as expected ({_first_line(error)})") from None
    return Published(model, c, family, folder, precision)


def _contradiction(model: nn.Module, keys: KeyMap, found: Mapping[str, Tensor], folder: Path) -> str:
    """Which tensor is not as large as the configuration says, missing or one too many, by its published name; or ""."""
    try:
        wanted = keys.save(model.state_dict())
    except (CheckpointError, RuntimeError, ValueError):
        return ""
    for name, value in found.items():
        if name in wanted and value.shape != wanted[name].shape:
            sizes = f"{list(value.shape)}, its config.json asks for {list(wanted[name].shape)}"
            return f"{folder}: {name} is {sizes}"
    if absent := sorted(set(wanted) - set(found)):
        return f"{folder}: {len(absent)} tensors are missing, such as {absent[0]}"
    extra = [name for name in sorted(set(found) - set(wanted)) if not _has_place(model, keys, name, found[name])]
    return f"{folder}: {len(extra)} tensors too many, such as {extra[0]}" if extra else ""


def _has_place(model: nn.Module, keys: KeyMap, name: str, value: Tensor) -> bool:
    """Whether a published tensor is of parameters that the model has, or of none because it is read over."""
    try:
        return set(keys.load({name: value})) <= set(model.state_dict())
    except (CheckpointError, RuntimeError, ValueError):
        return False


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return explain(error)
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
