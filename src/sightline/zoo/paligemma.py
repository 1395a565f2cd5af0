"""PaliGemma (arXiv:2407.07726): SigLIP, one linear layer, Gemma; the image and the question see themselves whole."""

from ..core.errors import ConfigError
from ..fusion.projector import ProjectorConfig
from ..model import VLMConfig
from .backbones import Json, decoder_keys, gemma_config, siglip_config, siglip_keys
from .keymap import KeyMap, rule


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`."""
    text = c["text_config"]
    if (kind := text.get("model_type", "gemma")) != "gemma":
        raise ConfigError(f"text_config of type {kind!r}, expected 'gemma' (PaliGemma 1)")
    image = siglip_config(c["vision_config"])
    decoder = gemma_config(text)
    return VLMConfig(image, ProjectorConfig(inputs=image.width, width=decoder.width, layers=1), decoder, look="prefix")


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names, which are laid out as llava-hf's."""
    return (
        siglip_keys(cfg.image).under("vision_tower.vision_model.", "encoder.")
        + decoder_keys(cfg.decoder, "language_model.model.", "language_model.lm_head.").under("", "decoder.")
        + KeyMap((rule("multi_modal_projector.linear.{p}", "fusion.layers.0.{p}"),))
    )
