"""Published keyword inputs, by their published names, as a batch: what most families share.

A family's own inputs are a function of the model, its configuration and the keywords; Published calls it and tells
which keyword is unknown.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.layout import Layout, Medium, causal_layout, framed
from ..core.patches import Patches, patchify
from ..data.batch import Batch
from ..fusion.cross_attention import CrossAttentionFusion
from ..language.decoder import Decoder
from ..language.seq2seq import Seq2Seq, Seq2SeqConfig
from ..model import VLM
from .configs import Json

NO_SLOTS = torch.zeros(0, dtype=torch.int64)


def words(
    model: nn.Module,
    c: Json,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> Batch:
    """What a language model alone reads; token types, which some tokenizers write for any model, say nothing to it."""
    ids = checked(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
    return filled(model, ids, torch.zeros_like(ids).bool(), None, attention_mask)


def pictures(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
) -> Batch:
    """Ids among which an id of its own stands for every image token, and pictures [n, 3, height, width].

    decoder_input_ids: what an encoder-decoder has written so far; its start token where there are none.
    """
    return written(model, shown(model, c, input_ids, pixel_values, attention_mask, token_type_ids), decoder_input_ids)


def shown(
    model: VLM,
    c: Json,
    input_ids: Tensor | None,
    pixel_values: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None = None,
) -> Batch:
    """Ids and pictures that are read."""
    ids = checked(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
    patches = None if pixel_values is None else cut(model, pixel_values)
    batch = filled(model, ids, is_image(c, ids), patches, attention_mask, token_type_ids)
    if looks(model):
        return replace(batch, layout=replace(batch.layout, item=is_image(c, ids).cumsum(1)))
    return batch


def is_image(c: Json, ids: Tensor) -> Tensor:
    """Which ids [batch, length] stand for an image token; negative ones where the configuration names none."""
    named = next((c[name] for name in ("image_token_index", "image_token_id") if name in c), None)
    return ids < 0 if named is None else ids == named


def looks(model: nn.Module) -> bool:
    """Whether pictures are looked at from beside the sequence instead of being read in it."""
    return isinstance(model, VLM) and isinstance(model.fusion, CrossAttentionFusion)


def written(model: nn.Module, batch: Batch, decoder_input_ids: Tensor | None) -> Batch:
    """A batch as the source of what an encoder-decoder writes: the ids given, or its start token; else as it is."""
    cfg = model.config.decoder if isinstance(model, VLM) else model.config
    if not isinstance(cfg, Seq2SeqConfig):
        if decoder_input_ids is not None:
            raise InputError("decoder_input_ids are for a model that writes beside what it reads, this one does not")
        return batch
    rows = len(batch.ids)
    if decoder_input_ids is None:
        decoder_input_ids = torch.full((rows, 1), cfg.start_id)
    ids = checked(decoder_input_ids, "decoder_input_ids")
    if len(ids) != rows:
        raise InputError(f"decoder_input_ids: found {len(ids)} rows, expected {rows} as in input_ids")
    within(model, ids, "decoder_input_ids")
    return Batch(ids, causal_layout(*ids.shape), NO_SLOTS, source=batch)


def checked(input_ids: Tensor | None, name: str = "input_ids", **beside: Tensor | None) -> Tensor:
    """The ids, when they are ids and all that has one number per token has their shape."""
    if input_ids is None or input_ids.dim() != 2 or input_ids.is_floating_point() or not input_ids.numel():
        shape = "none" if input_ids is None else f"{input_ids.dtype} {list(input_ids.shape)}"
        raise InputError(f"{name}: found {shape}, expected whole numbers [batch, length]")
    for other, given in beside.items():
        if given is not None and given.shape != input_ids.shape:
            raise InputError(f"{other} is {list(given.shape)}, expected {list(input_ids.shape)} as input_ids")
    return input_ids


def cut(model: VLM, pixel_values: Tensor) -> Patches:
    """Patches of pictures [n, 3, height, width]."""
    if pixel_values.dim() != 4:
        raise InputError(f"pixel_values: found {list(pixel_values.shape)}, expected [pictures, 3, height, width]")
    return patchify(pixel_values.to(model.dtype), model.config.image.patch_size)


def filled(
    model: nn.Module,
    ids: Tensor,
    is_slot: Tensor,
    patches: Patches | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    told: str = "image tokens in input_ids",
) -> Batch:
    """The batch of checked ids in which `is_slot` [batch, length] says where the tokens of the pictures go.

    told: what the slots are called where they are not as many as the pictures need.
    """
    if isinstance(model, VLM) and patches is not None:
        wanted = sum(model.num_tokens(*picture) for picture in patches.pictures())
        if int(is_slot.sum()) != wanted:
            raise InputError(f"{int(is_slot.sum())} {told}, the pictures need {wanted}")
    elif bool(is_slot.any()):
        raise InputError(f"{int(is_slot.sum())} {told}, but no pixel_values")
    slots = is_slot.flatten().nonzero()[:, 0]
    if looks(model):  # an image token is a token like any other
        is_slot = torch.zeros_like(is_slot)
    within(model, ids[~is_slot])
    real = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
    layout = left_to_right(real, is_slot)
    if isinstance(model, VLM) and model.config.look == "prefix":  # block 0 up to the first token of type 1
        written = torch.zeros_like(real) if token_type_ids is None else token_type_ids.long()
        layout = replace(layout, block=(written * real).cumsum(1), causal=False)
    if isinstance(model, VLM) and model.config.framed and patches is not None:
        still, last = framed(slots, [model.num_tokens(*picture) for picture in patches.pictures()])
        moves = real.flatten().index_fill(0, still, 0).view_as(real)
        medium = layout.medium.flatten().index_fill(0, last, Medium.TEXT).view_as(real)
        layout = replace(layout, position=(moves.cumsum(1) - 1).clamp(min=0), medium=medium)
    return Batch(torch.where(is_slot, 0, ids), layout, slots, patches)


def left_to_right(real: Tensor, is_slot: Tensor) -> Layout:
    """Tokens that each see those before them; real [batch, length] is 0 where a row is padded."""
    zero = torch.zeros_like(real)
    return Layout(
        document=real - 1,
        block=torch.arange(real.shape[1]).expand_as(real),
        position=(real.cumsum(1) - 1).clamp(min=0),
        medium=is_slot.long(),
        item=zero,
        branch=zero,
        causal=bool(real.all()),
    )


def within(model: nn.Module, ids: Tensor, name: str = "input_ids") -> None:
    """InputError where ids are not all in the model's vocabulary."""
    text = model.decoder if isinstance(model, VLM) else model
    assert isinstance(text, (Decoder, Seq2Seq))
    most = text.config.vocab_size + getattr(text.config, "extra_vocab", 0)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= most):
        raise InputError(f"{name} from {int(ids.min())} to {int(ids.max())}, expected 0 to {most - 1}")
