"""A published checkpoint by its folder: what `config.json` says it is, its weights, the inputs it is known by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.config import nearest
from ..core.errors import CheckpointError, ConfigError, InputError, SightlineError
from ..core.layout import Layout, Medium, causal_layout, framed
from ..core.patches import Patches, patchify
from ..data.batch import Batch
from ..encoders.vit import ViT
from ..fusion.cross_attention import CrossAttentionFusion
from ..fusion.qformer import QFormerConfig
from ..language.cache import Cache
from ..language.decoder import Decoder
from ..language.seq2seq import Seq2Seq
from ..layers.adapted import merged_state
from ..layers.packed import Precision
from ..model import VLM
from . import aria, backbones, blip2, idefics, internvl, kosmos2, languages, llava, paligemma, t5
from .backbones import Json
from .checkpoint import assign, read_json, read_tensors, write
from .hollow import hollow
from .keymap import KeyMap
from .prepared import dtype_of, prepared


@dataclass(frozen=True)
class Family:
    """How one family's folder becomes a model: its settings, the map of its names, its tensors in the map's layout.

    modules: what transformers calls a module in memory, by its name in any layout that it reads.
    masked: whether a mask tells which tokens are a picture's, whatever their ids, instead of an id of their own.
    """

    build: Callable[[Json, Path], nn.Module]
    keys: Callable[[Any], KeyMap]
    tensors: Callable[[Json, Path], Mapping[str, Tensor]]
    masked: bool = False
    modules: Callable[[str], str] = str


def _plain(c: Json, folder: Path) -> Mapping[str, Tensor]:
    return read_tensors(folder)


def _text(c: Json, folder: Path) -> Mapping[str, Tensor]:
    """Tensors of a language model; what turns pictures into words or back is left out."""
    return {key: value for key, value in read_tensors(folder).items() if not key.startswith("model.vqmodel.")}


def _tower(c: Json, folder: Path) -> Mapping[str, Tensor]:
    """Tensors of an encoder, with `vision_model.` before each name whichever way it was saved; text towers left out."""
    skipped = ("text_model.", "text_projection", "visual_projection", "logit_")
    found = {key: value for key, value in read_tensors(folder).items() if not key.startswith(skipped)}
    return {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in found.items()}


def _llava_tensors(c: Json, folder: Path) -> Mapping[str, Tensor]:
    return llava.published(read_tensors(folder))


def _vision(c: Json) -> Json:
    """The vision half of a two-tower configuration, or the configuration itself."""
    found: Json = c.get("vision_config", c)
    return found


FAMILIES: dict[str, Family] = {
    "llava": Family(lambda c, f: VLM(llava.config(c)), llava.keys, _llava_tensors, modules=llava.module_name),
    "llava_llama": Family(lambda c, f: VLM(llava.original_config(c, f)), llava.original_keys, llava.original_tensors),
    "idefics": Family(lambda c, f: VLM(idefics.config(c)), idefics.keys, _plain),
    "paligemma": Family(
        lambda c, f: VLM(paligemma.config(c)), paligemma.keys, _llava_tensors, modules=llava.module_name
    ),
    "blip-2": Family(lambda c, f: VLM(blip2.config(c)), blip2.keys, _plain),
    "instructblip": Family(lambda c, f: VLM(blip2.config(c)), blip2.keys, _plain),
    "internvl": Family(
        lambda c, f: VLM(internvl.config(c)), internvl.keys, internvl.tensors, modules=llava.module_name
    ),
    "internvl_chat": Family(lambda c, f: VLM(internvl.original_config(c)), internvl.original_keys, _plain),
    "aria": Family(
        lambda c, f: VLM(aria.config(c)),
        aria.keys,
        lambda c, f: llava.bare_tower(read_tensors(f)),
        modules=llava.module_name,
    ),
    "kosmos-2": Family(lambda c, f: VLM(kosmos2.config(c)), kosmos2.keys, _plain, masked=True),
    "clip": Family(
        lambda c, f: ViT(backbones.clip_config(_vision(c))),
        lambda cfg: backbones.clip_keys(cfg).under("vision_model.", ""),
        _tower,
    ),
    "siglip": Family(
        lambda c, f: ViT(backbones.siglip_config(_vision(c))),
        lambda cfg: backbones.siglip_keys(cfg).under("vision_model.", ""),
        _tower,
    ),
    "dinov2": Family(lambda c, f: ViT(backbones.dinov2_config(c)), backbones.dinov2_keys, _plain),
    "internvl_vision": Family(
        lambda c, f: ViT(backbones.internvl_vision_config(c)), backbones.internvl_vision_keys, _plain
    ),
    "intern_vit_6b": Family(lambda c, f: ViT(backbones.intern_vit_config(c)), backbones.intern_vit_keys, _plain),
    "blip_2_vision_model": Family(lambda c, f: ViT(backbones.eva_clip_config(c)), backbones.eva_clip_keys, _plain),
    "kosmos_2_vision_model": Family(
        lambda c, f: ViT(backbones.kosmos2_vision_config(c)),
        lambda cfg: backbones.clip_keys(cfg).under("model.", ""),
        _plain,
    ),
    **{
        name: Family(lambda c, f: Decoder(languages.language_config(c)), language.keys, _text)
        for name, language in languages.LANGUAGES.items()
    },
}
FAMILIES["t5"] = Family(lambda c, f: Seq2Seq(t5.config(c)), t5.keys, _plain)
FAMILIES["clip_vision_model"] = FAMILIES["clip"]
FAMILIES["siglip_vision_model"] = FAMILIES["siglip"]
FAMILIES["dinov2_with_registers"] = FAMILIES["dinov2"]
FAMILIES["instructblip_vision_model"] = FAMILIES["blip_2_vision_model"]


def family_of(c: Json) -> str:
    """The family that a configuration names; ConfigError tells the nearest known one."""
    kind = str(c.get("model_type", ""))
    original = "mm_vision_tower" in c or "LlavaLlamaForCausalLM" in (c.get("architectures") or [])
    if original and kind in ("llava", "llava_llama", "llama"):
        return "llava_llama"
    if kind not in FAMILIES:
        raise ConfigError(f"config.json names the model type {kind!r}, which is not known{nearest(kind, FAMILIES)}")
    return kind


class Published:
    """A loaded checkpoint that answers the keyword inputs of its published model.

    model: a VLM, a bare Decoder or a bare ViT. config: its `config.json`. precision: what it is run in.
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

    @property
    def image_token(self) -> int:
        """The id that stands for one image token in `input_ids`."""
        for name in ("image_token_index", "image_token_id"):
            if name in self.config:
                return int(self.config[name])
        return -200 if self.family == "llava_llama" else -1

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
    def logits(self, decoder_input_ids: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Scores [batch, length, vocabulary] in float32 for inputs by their published names.

        input_ids [batch, length], already expanded; pixel_values [images, 3, height, width]; attention_mask and
        token_type_ids [batch, length] as the published model takes them; for InstructBLIP qformer_input_ids and
        qformer_attention_mask [images, words]; for Kosmos-2 image_embeds_position_mask [batch, length], 1 where a token
        is a picture's; decoder_input_ids [batch, length] for a model that writes beside what it reads. A model that
        looks at pictures from beside its sequence may take pixel_values [batch, pictures, 3, height, width], filled up
        to the row with most, together with image_attention_mask [batch, length, pictures].
        """
        batch, runner = self.batch(**inputs), self.runner
        if isinstance(runner, Seq2Seq):
            if decoder_input_ids is None:
                raise InputError(f"a {self.family} model needs decoder_input_ids")
            return t5.logits(runner, t5.read(runner, batch.ids, batch.layout), decoder_input_ids)
        if decoder_input_ids is not None:
            raise InputError(f"a {self.family} model takes no decoder_input_ids")
        if isinstance(runner, VLM):
            return runner.logits(runner(batch))
        decoder = self._decoder(runner)
        return decoder.logits(decoder(decoder.embed(batch.ids), batch.layout))

    @torch.inference_mode()
    def generate_ids(self, max_new_tokens: int, **inputs: Tensor) -> Tensor:
        """The greedy continuation [batch, at most max_new_tokens]; rows that ended are filled up with the end token."""
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        batch, runner = self.batch(**inputs), self.runner
        if isinstance(runner, Seq2Seq):
            return self._write_beside(runner, batch, max_new_tokens)
        decoder = self._decoder(runner)
        if not bool((batch.layout.document[:, -1] >= 0).all()):
            raise InputError("a prompt is padded on the right, expected padding on the left for generation")
        length = batch.ids.shape[1]
        cache = decoder.new_cache(min(length + max_new_tokens, max(length, decoder.config.max_length)))
        hidden = _read(runner, batch, cache, torch.arange(length - 1, batch.ids.numel(), length))
        return self._greedy(decoder, hidden, cache, lambda step: _read(runner, step, cache)[:, -1], max_new_tokens)

    def _write_beside(self, runner: Seq2Seq, batch: Batch, most: int) -> Tensor:
        """The greedy answer of a model that writes beside what it reads, from its start token on."""
        memory, cache = t5.read(runner, batch.ids, batch.layout), runner.new_cache(most)
        start = torch.full((len(batch.ids), 1), int(self.config.get("decoder_start_token_id") or 0))

        def read(step: Batch) -> Tensor:
            return cast(Tensor, runner(runner.embed(step.ids), step.layout, memory, cache))[:, -1]

        first = Batch(start, causal_layout(len(start), 1), torch.zeros(0, dtype=torch.int64))
        return self._greedy(runner, read(first), cache, read, most)

    def _greedy(
        self, head: Decoder | Seq2Seq, hidden: Tensor, cache: Cache, read: Callable[[Batch], Tensor], most: int
    ) -> Tensor:
        """The likeliest tokens [batch, at most `most`], each read by `read` for the hidden states of the next."""
        ends = self._ends()
        done = torch.zeros(len(hidden), dtype=torch.bool)
        written: list[Tensor] = []
        for _ in range(most):
            chosen = head.logits(hidden).argmax(-1)
            if ends:
                chosen = torch.where(done, ends[0], chosen)
                done |= torch.isin(chosen, torch.tensor(ends))
            written.append(chosen)
            if bool(done.all()):
                break
            assert cache.layout is not None
            hidden = read(Batch(chosen[:, None], cache.layout.next(), torch.zeros(0, dtype=torch.int64)))
        return torch.stack(written, dim=1)

    def save(self, folder: Path) -> None:
        """Write the model in its published layout, adapters merged, with its configuration as it was read."""
        keys = FAMILIES[self.family].keys(self.model.config)
        write(folder, keys.save(merged_state(self.model)), self.config)

    def batch(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        image_embeds_position_mask: Tensor | None = None,
        **other: Any,
    ) -> Batch:
        """The published inputs as a batch; InputError where pictures and their places do not match."""
        if other:
            more = ("qformer_input_ids", "qformer_attention_mask", "image_attention_mask", "image_embeds_position_mask")
            known = ("input_ids", "pixel_values", "attention_mask", "token_type_ids", *more)
            raise InputError(f"unknown input {min(other)!r}{nearest(min(other), known)}")
        if input_ids is None or input_ids.dim() != 2 or input_ids.is_floating_point() or not input_ids.numel():
            shape = "none" if input_ids is None else f"{input_ids.dtype} {list(input_ids.shape)}"
            raise InputError(f"input_ids: found {shape}, expected whole numbers [batch, length]")
        masks = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        for name, given in (masks | {"image_embeds_position_mask": image_embeds_position_mask}).items():
            if given is not None and given.shape != input_ids.shape:
                raise InputError(f"{name} is {list(given.shape)}, expected {list(input_ids.shape)} as input_ids")
        masked = self.family in FAMILIES and FAMILIES[self.family].masked  # our own models are of none
        if image_embeds_position_mask is not None and not masked:
            raise InputError(f"a {self.family} model takes no image_embeds_position_mask")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        is_slot = input_ids == self.image_token if isinstance(self.model, VLM) else torch.zeros_like(input_ids).bool()
        if image_embeds_position_mask is not None:
            is_slot = image_embeds_position_mask.bool()
        told = "image tokens in " + ("image_embeds_position_mask" if masked else "input_ids")
        patches = owners = looks = None
        if image_attention_mask is not None:
            is_slot = torch.zeros_like(is_slot)
            patches, owners, looks = self._beside(input_ids, pixel_values, image_attention_mask)
        elif isinstance(self.model, VLM) and pixel_values is not None:
            if pixel_values.dim() != 4:
                raise InputError(
                    f"pixel_values: found {list(pixel_values.shape)}, expected [pictures, 3, height, width]"
                )
            patches = patchify(pixel_values.to(self.model.dtype), self.model.config.image.patch_size)
            wanted = sum(self.model.num_tokens(grid) for grid in patches.grids)
            if int(is_slot.sum()) != wanted:
                raise InputError(f"{int(is_slot.sum())} {told}, the pictures need {wanted}")
        elif bool(is_slot.any()):
            raise InputError(f"{int(is_slot.sum())} {told}, but no pixel_values")
        elif pixel_values is not None:
            raise InputError(f"a {self.family} model takes no pixel_values")
        slots = is_slot.flatten().nonzero()[:, 0]
        if self._looks:  # an image token is a token like any other
            is_slot = torch.zeros_like(is_slot)
        words = input_ids[~is_slot]
        text = self.model if isinstance(self.model, Seq2Seq) else self._decoder(self.model)
        most = text.config.vocab_size + getattr(text.config, "extra_vocab", 0)
        if len(words) and (int(words.min()) < 0 or int(words.max()) >= most):
            raise InputError(f"input_ids from {int(words.min())} to {int(words.max())}, expected 0 to {most - 1}")
        layout, asked = self._layout(real, is_slot, token_type_ids), None
        if self._looks:
            layout = replace(layout, item=(input_ids == self.image_token).cumsum(1))
        elif isinstance(self.model, VLM) and self.model.config.framed and patches is not None:
            still, last = framed(slots, [self.model.num_tokens(grid) for grid in patches.grids])
            moves = real.flatten().index_fill(0, still, 0).view_as(real)
            medium = layout.medium.flatten().index_fill(0, last, Medium.TEXT).view_as(real)
            layout = replace(layout, position=(moves.cumsum(1) - 1).clamp(min=0), medium=medium)
        if qformer_input_ids is not None:
            asked = self._instruction(qformer_input_ids, qformer_attention_mask)
        ids = torch.where(is_slot, 0, input_ids)
        return Batch(ids, layout, slots, patches, instruction=asked, owners=owners, looks=looks)

    @property
    def _looks(self) -> bool:
        """Whether pictures are looked at from beside the sequence instead of being read in it."""
        return isinstance(self.model, VLM) and isinstance(self.model.fusion, CrossAttentionFusion)

    def _beside(
        self, input_ids: Tensor, pixel_values: Tensor | None, image_attention_mask: Tensor
    ) -> tuple[Patches | None, Tensor | None, Tensor | None]:
        """Patches of the pictures that are looked at, whose they are, and which tokens look at which."""
        if not self._looks or not isinstance(self.model, VLM):
            raise InputError(f"a {self.family} model takes no image_attention_mask")
        if pixel_values is None or pixel_values.dim() != 5 or len(pixel_values) != len(input_ids):
            found = "none" if pixel_values is None else list(pixel_values.shape)
            raise InputError(f"pixel_values: found {found}, expected [{len(input_ids)}, pictures, 3, height, width]")
        wanted = [*input_ids.shape, pixel_values.shape[1]]
        if list(image_attention_mask.shape) != wanted:
            raise InputError(f"image_attention_mask is {list(image_attention_mask.shape)}, expected {wanted}")
        looks = image_attention_mask.bool()
        row, number = looks.any(dim=1).nonzero().unbind(1)  # what only fills a row up is not computed
        if not len(row):
            return None, None, None
        patches = patchify(pixel_values[row, number].to(self.model.dtype), self.model.config.image.patch_size)
        return patches, torch.stack((row, torch.zeros_like(row), number + 1), dim=1), looks

    def _instruction(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """What the fusion reads with each picture, -1 where it is padded."""
        reads = self.model.config.fusion if isinstance(self.model, VLM) else None
        if not isinstance(reads, QFormerConfig) or not reads.vocab_size:
            raise InputError(f"a {self.family} model reads no qformer_input_ids")
        if mask is not None and mask.shape != ids.shape:
            raise InputError(f"qformer_attention_mask is {list(mask.shape)}, expected {list(ids.shape)} as its ids")
        if ids.dim() != 2 or int(ids.min()) < 0 or int(ids.max()) >= reads.vocab_size:
            raise InputError(f"qformer_input_ids: expected ids [images, words] from 0 to {reads.vocab_size - 1}")
        return ids if mask is None else ids.masked_fill(mask == 0, -1)

    def _layout(self, real: Tensor, is_slot: Tensor, token_type_ids: Tensor | None) -> Layout:
        """Causal, or for a prefix model block 0 up to the first token of type 1."""
        counted = torch.arange(real.shape[1]).expand_as(real)
        prefix = isinstance(self.model, VLM) and self.model.config.look == "prefix"
        written = torch.zeros_like(real) if token_type_ids is None else token_type_ids.long()
        return Layout(
            document=real - 1,
            block=(written * real).cumsum(1) if prefix else counted,
            position=(real.cumsum(1) - 1).clamp(min=0),
            medium=is_slot.long(),
            item=torch.zeros_like(real),
            branch=torch.zeros_like(real),
            causal=not prefix and bool(real.all()),
        )

    def _decoder(self, runner: nn.Module) -> Decoder:
        decoder = runner.decoder if isinstance(runner, VLM) else runner
        if not isinstance(decoder, Decoder):
            raise InputError(f"a {self.family} model writes no text")
        return decoder

    def _ends(self) -> list[int]:
        """Ids that end an answer, from the generation settings or the configuration."""
        path = self.folder / "generation_config.json"
        settings = read_json(path) if path.exists() else {}
        found = settings.get("eos_token_id", self.config.get("eos_token_id"))
        if found is None:
            found = (self.config.get("text_config") or {}).get("eos_token_id")
        return [] if found is None else [found] if isinstance(found, int) else list(found)


def _read(runner: nn.Module, batch: Batch, cache: Cache, rows: Tensor | None = None) -> Tensor:
    """Hidden states of a VLM or a bare decoder."""
    if isinstance(runner, VLM):
        return cast(Tensor, runner(batch, cache, None, rows))
    assert isinstance(runner, Decoder)
    return cast(Tensor, runner(runner.embed(batch.ids), batch.layout, None, cache, rows))


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
    except (ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"{where}: its values describe no {family} model ({reason})") from None


def load_published(folder: Path, precision: Precision = "fp32") -> Published:
    """Load a folder by its own `config.json`; CheckpointError or ConfigError tells what is wrong with it."""
    c = read_json(folder / "config.json")
    family = family_of(c)
    chosen = FAMILIES[family]
    model = build(family, c, folder)
    tensors = chosen.keys(model.config).load(chosen.tensors(c, folder))
    return Published(assign(model, tensors, dtype_of(precision), folder), c, family, folder, precision)
