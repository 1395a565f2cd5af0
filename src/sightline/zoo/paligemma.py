"""PaliGemma (arXiv:2407.07726) and PaliGemma 2 (arXiv:2412.03555): SigLIP, one linear layer, Gemma or Gemma 2.

The image and the question see themselves whole.
"""

from ..core.errors import ConfigError
from ..fusion.projector import ProjectorConfig
from ..model import VLMConfig
from .backbones import Json, decoder_keys, language_config, siglip_config, siglip_keys
from .keymap import KeyMap, rule


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`."""
    text = c["text_config"]
    if (kind := text.get("model_type", "gemma")) not in ("gemma", "gemma2"):
        raise ConfigError(f"text_config of type {kind!r}, expected 'gemma' or 'gemma2'")
    image = siglip_config(c["vision_config"])
    decoder = language_config({**text, "model_type": kind, "use_bidirectional_attention": False})  # the layout's matter
    return VLMConfig(image, ProjectorConfig(inputs=image.width, width=decoder.width, layers=1), decoder, look="prefix")


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names, which are laid out as llava-hf's."""
    return (
        siglip_keys(cfg.image).under("vision_tower.vision_model.", "encoder.")
        + decoder_keys(cfg.decoder, "language_model.model.", "language_model.lm_head.").under("", "decoder.")
        + KeyMap((rule("multi_modal_projector.linear.{p}", "fusion.layers.0.{p}"),))
    )
