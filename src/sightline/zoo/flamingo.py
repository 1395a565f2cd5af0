"""OpenFlamingo (arXiv:2308.01390) and Otter (arXiv:2305.03726): CLIP, a Perceiver, a language model that looks at both.

They follow Flamingo (arXiv:2204.14198), whose weights were never published; its own encoder, an NFNet, is not here.

- "otter" and "flamingo", Luodian/Otter's layouts: one folder holds the whole model, named as transformers names CLIP.
- "open_flamingo": the names of mlfoundations/open_flamingo, whose checkpoints hold only what was trained. Beside such
  a file, in the folders `vision` and `language`, may lie CLIP and the language model as they were published.

A token looks at the picture whose `<image>` came last. Which id that is the published files leave to the tokenizer;
`media_token_id` in `config.json` says it where it is not the usual one.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.sequence import Conversation
from ..data.batch import Batch
from ..data.images import CenterCrop
from ..data.processor import ImagePipeline
from ..data.template import End, Segment, Writer, spoken
from ..encoders.vit import ViTConfig
from ..fusion.cross_attention import CrossAttentionConfig
from ..fusion.resampler import ResamplerConfig
from ..language.decoder import DecoderConfig
from ..model import VLM, VLMConfig
from .backbones import clip_config
from .checkpoint import read_tensors
from .configs import Json
from .encoder_names import clip_keys
from .family import CLIP, Family, Habits, Row, Stages, llama, scaling
from .inputs import checked, cut, filled
from .keymap import KeyMap, flat_patch, halves, rule, stacked
from .language_names import decoder_keys, gpt_neox_keys, mosaic_keys, mpt_keys
from .languages import language_config
from .llava import clip_l
from .perceivers import flamingo_config, flamingo_keys, otter_keys


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`; sizes of heads and feed-forwards are fixed by the published code."""
    image, decoder = clip_config(c.get("vision_config") or {}), language_config(c.get("text_config") or {})
    fusion = CrossAttentionConfig(
        inputs=image.width,
        width=decoder.width,
        heads=8,
        head_dim=64,
        mlp=4 * decoder.width,
        resampler=flamingo_config(image.width, frames=c.get("max_num_frames") or 0),
        interval=c.get("cross_attn_every_n_layers", 4),
    )
    return VLMConfig(image, fusion, decoder)


# ----------------------------------------------------------------------------------------------------------- names


def keys(cfg: VLMConfig) -> KeyMap:
    """The names of Luodian/Otter."""
    assert isinstance(cfg.fusion, CrossAttentionConfig) and isinstance(cfg.fusion.resampler, ResamplerConfig)
    return (
        clip_keys(cfg.vit).under("vision_encoder.vision_model.", "encoder.")
        + otter_keys(cfg.fusion.resampler).under("perceiver.", "fusion.resampler.")
        + conditioned_keys(cfg, "feed_forward.").under("lang_encoder.", "decoder.")
    )


def original_keys(cfg: VLMConfig) -> KeyMap:
    """The names of mlfoundations/open_flamingo."""
    assert isinstance(cfg.fusion, CrossAttentionConfig) and isinstance(cfg.fusion.resampler, ResamplerConfig)
    return (
        open_clip_keys(cfg.vit).under("vision_encoder.", "encoder.")
        + flamingo_keys(cfg.fusion.resampler).under("perceiver.", "fusion.resampler.")
        + conditioned_keys(cfg, "ff.").under("lang_encoder.", "decoder.")
    )


def language_keys(cfg: DecoderConfig) -> KeyMap:
    """The names of a language model that these families are built on, told apart by its settings."""
    if cfg.gated:
        return decoder_keys(cfg)
    if not cfg.scores.alibi:
        return gpt_neox_keys(cfg)
    return mosaic_keys(cfg) if cfg.qk_norm else mpt_keys(cfg)


def inside(name: str) -> str:
    """A language model's published name where its blocks stand beside cross-attention blocks."""
    return name.replace(".{i}.", ".{i}.decoder_layer.", 1)


def conditioned_keys(cfg: VLMConfig, feedforward: str) -> KeyMap:
    """Names of a language model with cross-attention blocks; feedforward: what the latter call theirs."""
    assert isinstance(cfg.fusion, CrossAttentionConfig)
    places, depth = cfg.fusion.places(cfg.decoder.depth), cfg.decoder.depth
    plain = language_keys(cfg.decoder)
    moved = KeyMap(
        tuple(replace(r, theirs=inside(r.theirs)) for r in plain.rules), tuple(map(inside, plain.ignore))
    ).numbered({i: i + sum(place <= i for place in places) for i in range(depth)})
    root = next(r.theirs.split("{i}.")[0] for r in plain.rules if "{i}." in r.theirs)
    crossing = cross_keys(feedforward).under(root, "").numbered({i: i + k for k, i in enumerate(places)})
    return moved + crossing


def cross_keys(feedforward: str) -> KeyMap:
    """Names of cross-attention blocks, below the list of the language model's blocks."""
    layer, block = "{i}.gated_cross_attn_layer.", "blocks.{i}."
    attention = f"{block}cross_attention."
    return KeyMap(
        (
            rule(f"{layer}attn.norm.{{p}}", f"{block}cross_norm1.{{p}}"),
            rule(f"{layer}attn.to_q.{{p}}", f"{attention}q.{{p}}"),
            rule(f"{layer}attn.to_kv.{{p}}", f"{attention}k.{{p}}", f"{attention}v.{{p}}", reshape=halves()),
            rule(f"{layer}attn.to_out.{{p}}", f"{attention}o.{{p}}"),
            rule(f"{layer}attn_gate", f"{block}cross_gate1"),
            rule(f"{layer}{feedforward}0.{{p}}", f"{block}cross_norm2.{{p}}"),
            rule(f"{layer}{feedforward}1.{{p}}", f"{block}cross_feedforward.up.{{p}}"),
            rule(f"{layer}{feedforward}3.{{p}}", f"{block}cross_feedforward.down.{{p}}"),
            rule(f"{layer}ff_gate", f"{block}cross_gate2"),
        )
    )


def open_clip_keys(cfg: ViTConfig) -> KeyMap:
    """OpenCLIP's names of CLIP's vision tower; the projection to the space of captions is left out."""
    layer, block = "transformer.resblocks.{i}.", "blocks.{i}."
    names = {"attn.out_proj": "attention.o", "ln_1": "norm1", "ln_2": "norm2"}
    names |= {"mlp.c_fc": "feedforward.up", "mlp.c_proj": "feedforward.down"}
    return KeyMap(
        (
            rule("conv1.weight", "patch.weight", reshape=flat_patch(cfg.channels, cfg.patch_size)),
            rule("class_embedding", "class_token"),
            rule("positional_embedding", "positions"),
            rule("ln_pre.{p}", "pre_norm.{p}"),
            rule(f"{layer}attn.in_proj_{{p}}", *(f"{block}attention.{x}.{{p}}" for x in "qkv"), reshape=stacked(3)),
            *(rule(f"{layer}{theirs}.{{p}}", f"{block}{ours}.{{p}}") for theirs, ours in names.items()),
            rule("ln_post.{p}", "norm.{p}"),
        ),
        ignore=("proj",),
    )


TWICE = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")  # the same blocks once more


def original_tensors(c: Json, folder: Path) -> Mapping[str, Tensor]:
    """Tensors of a checkpoint and of the two it was trained on, under the names of the whole.

    What was trained wins; rows of tables above `vocab_size` were cut off when the tokenizer's tokens were added.
    """
    cfg = config(c)
    found: dict[str, Tensor] = {}
    if (folder / "vision").is_dir():
        tower = {k: v for k, v in read_tensors(folder / "vision").items() if k.startswith("vision_model.")}
        ours = clip_keys(cfg.vit).under("vision_model.", "").load(tower)
        found |= {f"vision_encoder.{k}": v for k, v in open_clip_keys(cfg.vit).save(ours).items()}
    if (folder / "language").is_dir():
        root = next(r.theirs.split("{i}.")[0] for r in language_keys(cfg.decoder).rules if "{i}." in r.theirs)
        for key, value in read_tensors(folder / "language").items():
            number, _, rest = key.removeprefix(root).partition(".")
            name = f"{root}{number}.decoder_layer.{rest}" if key.startswith(root) else key
            cut_off = name.endswith(("wte.weight", "embed_in.weight", "embed_out.weight"))
            found[f"lang_encoder.{name}"] = value[: cfg.decoder.vocab_size] if cut_off else value
    trained = read_tensors(folder)
    found |= {k.replace("vision_encoder.visual.", "vision_encoder.", 1): v for k, v in trained.items()}
    return {key: value for key, value in found.items() if not key.startswith(TWICE)}


# ---------------------------------------------------------------------------------------------- inputs and templates


def media_token(c: Json) -> int:
    """The id of `<image>`, the second token that was added to the language model's."""
    return int(c.get("media_token_id", 32_001 if (c.get("text_config") or {}).get("model_type") == "llama" else 50_278))


def inputs(
    model: VLM,
    c: Json,
    lang_x: Tensor | None = None,
    vision_x: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Batch:
    """Ids [batch, length] and pictures [batch, pictures, frames, 3, height, width], filled up to the row with most.

    A row's pictures belong to its `<image>` tokens in their order; those left over are not looked at.
    """
    if lang_x is None:
        raise InputError("lang_x: found none, expected whole numbers [batch, length]")
    ids = checked(lang_x, attention_mask=attention_mask)
    began = (ids == media_token(c)).cumsum(1)
    counts = began[:, -1]
    batch = filled(model, ids, torch.zeros_like(ids).bool(), None, attention_mask)
    batch = replace(batch, layout=replace(batch.layout, item=began))
    if vision_x is None:
        if bool(counts.any()):
            raise InputError(f"{int(counts.sum())} <image> tokens in lang_x, but no vision_x")
        return batch
    if vision_x.dim() != 6 or len(vision_x) != len(ids):
        wanted = f"[{len(ids)}, pictures, frames, 3, height, width]"
        raise InputError(f"vision_x: found {list(vision_x.shape)}, expected {wanted}")
    most, frames = int(counts.max()), vision_x.shape[2]
    if most > vision_x.shape[1]:
        raise InputError(f"{most} <image> tokens in a row of lang_x for {vision_x.shape[1]} pictures of vision_x")
    row, number = (torch.arange(vision_x.shape[1]) < counts[:, None]).nonzero().unbind(1)
    if not len(row):
        return batch
    patches = cut(model, vision_x[row, number].flatten(0, 1))
    patches = replace(patches, grids=tuple((frames, h, w) for _, h, w in patches.grids[::frames]))
    owners = torch.stack((row, torch.zeros_like(row), number + 1), dim=1)
    return replace(batch, patches=patches, owners=owners)


CHUNK = "<|endofchunk|>"


def flamingo_template(conversation: Conversation) -> list[Segment]:
    """How OpenFlamingo's own evaluation asks: a question behind its picture, or a picture alone for a caption.

    Turns before the last are examples that tell it what to do.
    """
    out = Writer()
    for message in spoken(conversation):
        if message.role == "assistant":
            out.parts(message, learned=True)
            out.segments.append(End(CHUNK))
        elif (question := out.shown(message)).parts:
            out.words("Question:")
            out.parts(question)
            out.words(" Short answer:")
        else:
            out.words("Output:")
    return out.segments


def otter_template(conversation: Conversation) -> list[Segment]:
    """Otter's: the user's words, a token before the answer, another one behind it."""
    out = Writer()
    for message in spoken(conversation):
        if message.role == "assistant":
            out.parts(message, learned=True)
            out.segments.append(End(CHUNK))
        else:
            question = out.shown(message)
            out.words("User: ")
            out.parts(question)
            out.words(" GPT:")
            out.control("<answer>")
    return out.segments


# ------------------------------------------------------------------------------------------------- families and rows


def open_clip_crop(c: Json, side: int) -> ImagePipeline:
    """OpenCLIP's pictures: CLIP's, but for where the middle is cut out."""
    return CenterCrop(side, side, scaling(c, CLIP), rounding="even")


FLAMINGO = Habits(flamingo_template, "<image>", end=CHUNK, pixels=open_clip_crop)
FAMILIES = {
    "flamingo": Family(lambda c, f: VLM(config(c)), keys, inputs=inputs, habits=FLAMINGO),
    "open_flamingo": Family(
        lambda c, f: VLM(config(c)),
        original_keys,
        original_tensors,
        inputs,
        habits=FLAMINGO,
    ),
    "otter": Family(
        lambda c, f: VLM(config(c)), keys, inputs=inputs, habits=Habits(otter_template, "<image>", end=CHUNK)
    ),
}

NEW = ("fusion.*", "decoder.blocks.*.cross_*", "decoder.embedding.*")
STAGES: Stages = {"pretrain": NEW}
OTTER_STAGES: Stages = {"instruct": (*NEW, "decoder.head.*")}

# the tokenizer's 50277 tokens, two of Flamingo's and one for padding
MPT_7B: dict[str, Any] = {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50_280}
MPT_1B: dict[str, Any] = {
    "model_type": "mosaic_gpt",
    "d_model": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "vocab_size": 50_280,
}
MPT_1B |= {"mlp_ratio": 4, "attn_qk_ln": True}
REDPAJAMA_3B: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
REDPAJAMA_3B |= {"intermediate_size": 10_240, "rotary_pct": 1.0, "use_parallel_residual": False}
REDPAJAMA_3B |= {"vocab_size": 50_280}

PROOF = "logits and greedy tokens equal its public code's on random weights of this layout"


def _row(name: str, llm: str, text: dict[str, Any], every: int, source: str, **more: Any) -> Row:
    return Row(
        name=name,
        family=more.pop("family", "OpenFlamingo"),
        encoder="CLIP ViT-L/14 224",
        fusion=f"Perceiver, gated cross-attention before every {every}. block"
        if every > 1
        else "Perceiver, gated cross-attention before every block",
        llm=llm,
        licence=more.pop("licence", "MIT"),
        source=source,
        read=config,
        config={"vision_config": clip_l(224), "text_config": text, "cross_attn_every_n_layers": every, **more},
        stages=STAGES if source.startswith("openflamingo") else OTTER_STAGES,
        proof=PROOF,
    )


ROWS = (
    _row("openflamingo-3b", "MPT 1B", MPT_1B, 1, "openflamingo/OpenFlamingo-3B-vitl-mpt1b"),
    _row("openflamingo-4b", "RedPajama 3B", REDPAJAMA_3B, 2, "openflamingo/OpenFlamingo-4B-vitl-rpj3b"),
    _row("openflamingo-9b", "MPT 7B", MPT_7B, 4, "openflamingo/OpenFlamingo-9B-vitl-mpt7b"),
    _row("otter-mpt-7b", "MPT 7B", {**MPT_7B, "vocab_size": 50_432}, 4, "luodian/OTTER-Image-MPT7B", family="Otter"),
    _row(
        "otter-llama-7b",
        "LLaMA 7B",
        llama("7b", vocab_size=32_004, rms_norm_eps=1e-6, max_position_embeddings=2048),
        4,
        "luodian/OTTER-Image-LLaMA7B-LA-InContext",
        family="Otter",
        licence="LLaMA 1",
    ),
)
