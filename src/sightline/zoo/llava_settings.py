"""A model's settings as a `config.json` of LLaVA says them, and what of them it has no place for.

A candidate configuration is written and read back: whatever then differs from the model is what does not fit.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..encoders.vit import ViTConfig
from ..encoders.vq import VQConfig
from ..fusion.projector import ProjectorConfig
from ..language.decoder import DecoderConfig
from ..language.seq2seq import Seq2SeqConfig
from ..layers.attention import QKNorm
from ..model import VLMConfig
from . import llava
from .configs import ACTIVATIONS


def fitted(cfg: VLMConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], VLMConfig, dict[str, Tensor]]:
    """A `config.json` of LLaVA that says what these settings say, those settings, and the weights by its names.

    Raises ConfigError, which tells every setting that the layout has no place for.
    """
    same, tensors = equivalent(cfg, dict(state))
    apart: list[list[str]] = []
    for text in TEXTS.values():
        assert isinstance(same.image, ViTConfig) and isinstance(same.decoder, DecoderConfig)
        c = {**_outer(same), "vision_config": _vision(same.image), "text_config": text(same.decoder)}
        try:
            found, _ = equivalent(llava.config(c), {})
        except ConfigError as error:
            raise ConfigError(f"it does not fit LLaVA's layout: {error}") from None
        apart.append(differences(same, found))
        if not apart[-1]:
            return c, same, llava.keys(same).save(tensors)
    fewest = min(apart, key=lambda each: len(each))
    raise ConfigError(f"it does not fit LLaVA's layout: {'; '.join(fewest)}")


def equivalent(cfg: VLMConfig, state: dict[str, Tensor]) -> tuple[VLMConfig, dict[str, Tensor]]:
    """The same function in the plainest settings, with its weights: what a layout lacks may be a matter of writing."""
    image, fusion, decoder = cfg.image, cfg.fusion, cfg.decoder
    if isinstance(image, VQConfig) or isinstance(decoder, Seq2SeqConfig):
        kind = "image is 'codes'" if isinstance(image, VQConfig) else "decoder is an encoder-decoder"
        raise ConfigError(f"it does not fit LLaVA's layout: {kind}, expected a picture's features in a decoder")
    if not image.final_norm:  # a norm that is there and not applied
        image = replace(image, final_norm=True, normed=False)
        if state:
            state |= {"encoder.norm.weight": torch.ones(image.width), "encoder.norm.bias": torch.zeros(image.width)}
    if isinstance(fusion, ProjectorConfig):
        fusion, state = _two_layers(fusion, state)
    if decoder.norm_offset:
        for name in state:  # queries and keys have norms of their own, which are never stored so
            if name.startswith("decoder.") and "attention" not in name and name.split(".")[-2].startswith("norm"):
                state[name] = state[name] + 1
        decoder = replace(decoder, norm_offset=False)
    if decoder.scale_embedding:  # into the table; a tied head keeps the table as it was
        if state:
            table = state["decoder.embedding.weight"]
            head = {"decoder.head.weight": table} if decoder.tied else {}
            state |= {"decoder.embedding.weight": table * torch.tensor(decoder.width**0.5, dtype=table.dtype), **head}
        decoder = replace(decoder, scale_embedding=False, tied=False)
    norm = QKNorm() if decoder.qk_norm is True else decoder.qk_norm
    decoder = replace(decoder, kv_heads=decoder.kv_heads or decoder.heads, head_dim=decoder.head_size, qk_norm=norm)
    return replace(cfg, image=image, fusion=fusion, decoder=decoder), state


def _two_layers(fusion: ProjectorConfig, state: dict[str, Tensor]) -> tuple[ProjectorConfig, dict[str, Tensor]]:
    """A linear map as two, the second of which changes nothing; a narrow layer with rows of zeros up to the width."""
    hidden, width = fusion.hidden or fusion.width, fusion.width
    if fusion.layers == 1:
        if state:
            state["fusion.layers.1.weight"] = torch.eye(width)
            if fusion.bias:
                state["fusion.layers.1.bias"] = torch.zeros(width)
        fusion = replace(fusion, layers=2, activation="none", hidden=width)
    elif fusion.layers == 2 and hidden <= width:  # every activation keeps a zero
        for name, dim in (("0.weight", 0), ("0.bias", 0), ("1.weight", 1)):
            if (key := f"fusion.layers.{name}") in state and hidden < width:
                old = state[key]
                rows = old.new_zeros([width - hidden if i == dim else n for i, n in enumerate(old.shape)])
                state[key] = torch.cat((old, rows), dim)
        fusion = replace(fusion, hidden=width)
    return fusion, state


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Every setting of ours that is another one there, by its dotted name."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        fields = [f.name for f in dataclasses.fields(ours)]
        return [told for f in fields for told in differences(getattr(ours, f), getattr(theirs, f), f"{where}.{f}")]
    if ours == theirs:
        return []
    kinds = [getattr(x, "kind", x) if dataclasses.is_dataclass(x) else x for x in (ours, theirs)]
    return [f"{where.removeprefix('.')} is {kinds[0]!r}, expected {kinds[1]!r}"]


PUBLISHED_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


def _outer(cfg: VLMConfig) -> dict[str, Any]:
    """What a `config.json` of LLaVA says besides its two parts."""
    image, fusion = cfg.image, cfg.fusion
    assert isinstance(image, ViTConfig)
    projector = fusion if isinstance(fusion, ProjectorConfig) else ProjectorConfig(image.features, cfg.decoder.width)
    full = not image.class_token or image.keep_prefix
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "projector_hidden_act": PUBLISHED_ACTIVATIONS.get(projector.activation, projector.activation),
        "multimodal_projector_bias": projector.bias,
        "vision_feature_layer": list(image.layer) if isinstance(image.layer, tuple) else image.layer,
        "vision_feature_select_strategy": "full" if full else "default",
        "tie_word_embeddings": cfg.decoder.tied,
    }


def _vision(image: ViTConfig) -> dict[str, Any]:
    """CLIP's tower, or SigLIP's where there is no class token; its pooling head is not used, nor written."""
    return {
        "model_type": "clip_vision_model" if image.class_token else "siglip_vision_model",
        **({} if image.class_token else {"vision_use_head": False}),
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "num_channels": image.channels,
        "hidden_size": image.width,
        "num_hidden_layers": image.depth,
        "num_attention_heads": image.heads,
        "intermediate_size": image.mlp,
        "hidden_act": PUBLISHED_ACTIVATIONS.get(image.activation, image.activation),
        "layer_norm_eps": image.eps,
    }


def _text(cfg: DecoderConfig, kind: str, **more: Any) -> dict[str, Any]:
    """What the language classes of transformers have in common, in its layouts before and after version 5."""
    turned: dict[str, Any] = {"rope_type": "default"}
    if (scaling := cfg.rope_scaling) is not None:
        turned = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            turned |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
            turned |= {"original_max_position_embeddings": scaling.original}
    return {
        "model_type": kind,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads or cfg.heads,
        "head_dim": cfg.head_size,
        "intermediate_size": cfg.mlp,
        "hidden_act": PUBLISHED_ACTIVATIONS.get(cfg.activation, cfg.activation),
        "rms_norm_eps": cfg.eps,
        "max_position_embeddings": cfg.max_length,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **turned},
        **({} if cfg.rope_scaling is None else {"rope_scaling": turned}),
        "tie_word_embeddings": cfg.tied,
        **more,
    }


TEXTS: dict[str, Callable[[DecoderConfig], dict[str, Any]]] = {
    "llama": lambda cfg: _text(cfg, "llama", attention_bias=cfg.qkv_bias, mlp_bias=cfg.mlp_bias),
    "qwen2": lambda cfg: _text(cfg, "qwen2", use_sliding_window=False),
    "qwen3": lambda cfg: _text(cfg, "qwen3", attention_bias=cfg.qkv_bias, use_sliding_window=False),
    "mistral": lambda cfg: _text(cfg, "mistral", sliding_window=cfg.scores.window),
}
