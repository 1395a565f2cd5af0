"""BLIP-2 (arXiv:2301.12597) and InstructBLIP (arXiv:2305.06500): EVA-CLIP g, a Q-Former, a language model.

An InstructBLIP's Q-Former also reads the instruction, in the vocabulary of BERT; its language model reads its own.
"""

from ..core.errors import ConfigError
from ..fusion.qformer import QFormerConfig
from ..model import VLMConfig
from .backbones import Json, act, decoder_keys, eva_clip_config, eva_clip_keys, language_config
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
