"""BLIP-2 (arXiv:2301.12597) and InstructBLIP (arXiv:2305.06500): EVA-CLIP g, a Q-Former, a language model.

An InstructBLIP's Q-Former also reads the instruction, in the vocabulary of BERT; its language model reads its own.
"""

from dataclasses import replace

from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..data.batch import Batch
from ..fusion.qformer import QFormerConfig
from ..model import VLM, VLMConfig
from .backbones import Json, act, decoder_keys, eva_clip_config, eva_clip_keys, language_config
from .family import LOGITS, Family, Row, Stages, llama
from .inputs import pictures
from .keymap import KeyMap, leading, rule
from .language_names import opt_keys


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json` of either; ConfigError where it does not say which id holds a picture's place."""
    if c.get("image_token_index") is None:
        raise ConfigError("config.json has no image_token_index; files of before 2024 need it, and a token for it")
    decoder = language_config({"model_type": "opt", **c["text_config"]})
    image = eva_clip_config(c.get("vision_config") or {})
    return VLMConfig(image=image, fusion=qformer_config(c, decoder.width), decoder=decoder)


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    assert isinstance(cfg.fusion, QFormerConfig)
    words = opt_keys if cfg.decoder.positions == "learned" else decoder_keys  # OPT, or Vicuna
    return (
        eva_clip_keys(cfg.image).under("vision_model.", "encoder.")
        + qformer_keys(cfg.fusion).under("", "fusion.")
        + words(cfg.decoder).under("language_model.", "decoder.")
    )


def qformer_config(c: Json, width: int) -> QFormerConfig:
    """From a `config.json` of either; width: the decoder's. An InstructBLIP's queries read the instruction."""
    q, vision = c.get("qformer_config") or {}, c.get("vision_config") or {}
    reads = str(c.get("model_type", "")).startswith("instructblip")
    return QFormerConfig(
        inputs=vision.get("hidden_size", 1408),  # whatever `encoder_hidden_size` says, as the published code has it
        width=width,
        queries=c.get("num_query_tokens", 32),
        hidden=q.get("hidden_size", 768),
        depth=q.get("num_hidden_layers", 12),
        heads=q.get("num_attention_heads", 12),
        mlp=q.get("intermediate_size", 3072),
        activation=act(q.get("hidden_act", "gelu")),
        eps=q.get("layer_norm_eps", 1e-12),
        cross_every=q.get("cross_attention_frequency", 2),
        vocab_size=q.get("vocab_size", 30_522) if reads else 0,
        max_length=q.get("max_position_embeddings", 512),
    )


def qformer_keys(cfg: QFormerConfig) -> KeyMap:
    """The published names of queries, Q-Former and the map to the decoder's width."""
    layer, mine = "qformer.encoder.layer.{i}.", "layers.{i}."
    attentions = (("attention", "attention", "norm"), ("crossattention", "cross", "cross_norm"))
    feedforwards = [("intermediate_query", "output_query", "feedforward")]
    inputs = [rule("qformer.layernorm.{p}", "norm.{p}")]
    if cfg.vocab_size:
        feedforwards.append(("intermediate", "output", "words"))
        embeddings = "qformer.embeddings."
        inputs = [
            rule(f"{embeddings}word_embeddings.weight", "words.weight"),
            rule(f"{embeddings}position_embeddings.weight", "positions.weight"),
            rule(f"{embeddings}layernorm.{{p}}", "norm.{p}"),
        ]
    names = (("query", "q"), ("key", "k"), ("value", "v"))
    return KeyMap(
        (
            rule("query_tokens", "queries", reshape=leading(1)),
            *inputs,
            *(
                rule(f"{layer}{theirs}.attention.{t}.{{p}}", f"{mine}{ours}.{o}.{{p}}")
                for theirs, ours, _ in attentions
                for t, o in names
            ),
            *(rule(f"{layer}{theirs}.output.dense.{{p}}", f"{mine}{ours}.o.{{p}}") for theirs, ours, _ in attentions),
            *(rule(f"{layer}{theirs}.output.LayerNorm.{{p}}", f"{mine}{norm}.{{p}}") for theirs, _, norm in attentions),
            *(rule(f"{layer}{up}.dense.{{p}}", f"{mine}{ours}.up.{{p}}") for up, _, ours in feedforwards),
            *(rule(f"{layer}{down}.dense.{{p}}", f"{mine}{ours}.down.{{p}}") for _, down, ours in feedforwards),
            *(rule(f"{layer}{down}.LayerNorm.{{p}}", f"{mine}{ours}_norm.{{p}}") for _, down, ours in feedforwards),
            rule("language_projection.{p}", "out.{p}"),
        ),
        ignore=("qformer.embeddings.position_ids",),
    )


def instructed(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    qformer_input_ids: Tensor | None = None,
    qformer_attention_mask: Tensor | None = None,
) -> Batch:
    """InstructBLIP's: with each picture the ids [pictures, words] of what its Q-Former reads, and their mask."""
    batch = pictures(model, c, input_ids, pixel_values, attention_mask)
    ids, mask, reads = qformer_input_ids, qformer_attention_mask, model.config.fusion
    if ids is None:
        return batch
    assert isinstance(reads, QFormerConfig)
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"qformer_attention_mask is {list(mask.shape)}, expected {list(ids.shape)} as its ids")
    if ids.dim() != 2 or int(ids.min()) < 0 or int(ids.max()) >= reads.vocab_size:
        raise InputError(f"qformer_input_ids: expected ids [images, words] from 0 to {reads.vocab_size - 1}")
    return replace(batch, instruction=ids if mask is None else ids.masked_fill(mask == 0, -1))


FAMILIES = {
    "blip-2": Family(lambda c, f: VLM(config(c)), keys),
    "instructblip": Family(lambda c, f: VLM(config(c)), keys, inputs=instructed),
}

# EVA-CLIP g without its last block; the published configuration class has the same sizes by default
EVA_G = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16}
STAGES: Stages = {"represent": ("fusion.*",), "generate": ("fusion.*",)}  # arXiv:2301.12597 section 3


def _blip_2(size: str) -> Row:
    width, depth, mlp = {"2.7b": (2560, 32, 10240), "6.7b": (4096, 32, 16384)}[size]
    text = {"model_type": "opt", "hidden_size": width, "num_hidden_layers": depth, "ffn_dim": mlp}
    text |= {"num_attention_heads": 32, "vocab_size": 50304, "max_position_embeddings": 2048}
    return Row(
        name=f"blip2-opt-{size}",
        family="BLIP-2",
        encoder="EVA-CLIP g/14 224",
        fusion="Q-Former of 32 queries",
        llm=f"OPT {size.upper()}",
        licence="MIT",
        source=f"Salesforce/blip2-opt-{size}",
        read=config,
        config={"model_type": "blip-2", "vision_config": EVA_G, "text_config": text, "image_token_index": 50265},
        stages=STAGES,
        proof=LOGITS,
    )


def _instructblip(size: str) -> Row:
    text = llama(size, vocab_size=32001, rms_norm_eps=1e-6, max_position_embeddings=2048)
    sizes = {"vision_config": EVA_G, "qformer_config": {"vocab_size": 30523}, "text_config": text}
    return Row(
        name=f"instructblip-vicuna-{size}",
        family="InstructBLIP",
        encoder="EVA-CLIP g/14 224",
        fusion="Q-Former of 32 queries that read the question",
        llm=f"Vicuna {size.upper()} v1.1",
        licence="LLaMA, not for commerce",
        source=f"Salesforce/instructblip-vicuna-{size}",
        read=config,
        config={"model_type": "instructblip", "image_token_index": 32000, **sizes},
        stages={"instruct": ("fusion.*",)},
        proof=LOGITS,
    )


ROWS = (_blip_2("2.7b"), _blip_2("6.7b"), _instructblip("7b"), _instructblip("13b"))
