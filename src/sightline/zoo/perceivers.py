"""Perceiver resamplers of Flamingo's descendants: OpenFlamingo, Otter and IDEFICS."""

from ..fusion.resampler import ResamplerConfig
from .configs import Json
from .keymap import KeyMap, halves, rule


def flamingo_config(inputs: int, width: int | None = None, frames: int = 0) -> ResamplerConfig:
    """OpenFlamingo's and Otter's sizes, which their code fixes whatever the encoder and the decoder."""
    return ResamplerConfig(inputs=inputs, width=width, latents=64, depth=6, heads=8, head_dim=64, frames=frames)


def flamingo_keys(cfg: ResamplerConfig) -> KeyMap:
    """Names of mlfoundations/open_flamingo, below `perceiver.`."""
    return _original(cfg, attention="layers.{i}.0.", feedforward="layers.{i}.1.")


def otter_keys(cfg: ResamplerConfig) -> KeyMap:
    """Names of Luodian/Otter, below `perceiver.`."""
    return _original(cfg, attention="layers.{i}.", feedforward="layers.{i}.feed_forward.")


def _original(cfg: ResamplerConfig, attention: str, feedforward: str) -> KeyMap:
    block = "layers.{i}."
    frames = (rule("frame_embs", "frames"),) if cfg.frames else ()
    return KeyMap(
        (
            rule("latents", "latents"),
            *frames,
            rule(f"{attention}norm_media.{{p}}", f"{block}norm_features.{{p}}"),
            rule(f"{attention}norm_latents.{{p}}", f"{block}norm_latents.{{p}}"),
            rule(f"{attention}to_q.{{p}}", f"{block}attention.q.{{p}}"),
            rule(f"{attention}to_kv.{{p}}", f"{block}attention.k.{{p}}", f"{block}attention.v.{{p}}", reshape=halves()),
            rule(f"{attention}to_out.{{p}}", f"{block}attention.o.{{p}}"),
            rule(f"{feedforward}0.{{p}}", f"{block}norm.{{p}}"),
            rule(f"{feedforward}1.{{p}}", f"{block}feedforward.up.{{p}}"),
            rule(f"{feedforward}3.{{p}}", f"{block}feedforward.down.{{p}}"),
            rule("norm.{p}", "norm.{p}"),
        )
    )


def idefics_config(c: Json, width: int | None = None) -> ResamplerConfig:
    """IDEFICS' from its `config.json`; the feed-forward is ReLU whatever is written there."""
    perceiver, inputs = c.get("perceiver_config") or {}, (c.get("vision_config") or {}).get("embed_dim", 768)
    return ResamplerConfig(
        inputs=inputs,
        width=width,
        latents=perceiver.get("resampler_n_latents", 64),
        depth=perceiver.get("resampler_depth", 6),
        heads=perceiver.get("resampler_n_heads", 16),
        head_dim=perceiver.get("resampler_head_dim", 96),
        activation="relu",
        qk_norm=perceiver.get("qk_layer_norms_perceiver", False),
    )


def idefics_keys(cfg: ResamplerConfig) -> KeyMap:
    """Names of IDEFICS, below `model.perceiver_resampler.`."""
    attention, feedforward, block = "blocks.{i}.0.", "blocks.{i}.1.", "layers.{i}."
    norms = (rule(f"{attention}{x}_layer_norm.{{p}}", f"{block}attention.{x}_norm.{{p}}") for x in "qk" if cfg.qk_norm)
    return KeyMap(
        (
            rule("latents", "latents"),
            rule(f"{attention}context_layer_norm.{{p}}", f"{block}norm_features.{{p}}"),
            rule(f"{attention}latents_layer_norm.{{p}}", f"{block}norm_latents.{{p}}"),
            *norms,
            *(rule(f"{attention}{x}_proj.{{p}}", f"{block}attention.{x}.{{p}}") for x in "qkv"),
            rule(f"{attention}output_proj.{{p}}", f"{block}attention.o.{{p}}"),
            rule(f"{feedforward}ln.{{p}}", f"{block}norm.{{p}}"),
            rule(f"{feedforward}fc.{{p}}", f"{block}feedforward.up.{{p}}"),
            rule(f"{feedforward}c_proj.{{p}}", f"{block}feedforward.down.{{p}}"),
            rule("layer_norm.{p}", "norm.{p}"),
        )
    )
