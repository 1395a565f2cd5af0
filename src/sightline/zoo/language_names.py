"""Names and layouts of the tensors of published language models."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..language.decoder import DecoderConfig
from .keymap import KeyMap, Reshape, Rule, half_apart, rule, stacked


def grouped(queries: int, dim: int) -> Reshape:
    """Queries, keys and values published together, group by group: heads of queries, then their key and value."""

    def there(x: Tensor) -> list[Tensor]:
        cut = x.unflatten(0, (-1, queries + 2, dim))
        return [part.flatten(0, 2) for part in (cut[:, :queries], cut[:, queries : queries + 1], cut[:, queries + 1 :])]

    def back(xs: list[Tensor]) -> Tensor:
        cut = [x.unflatten(0, (-1, n, dim)) for x, n in zip(xs, (queries, 1, 1), strict=True)]
        return torch.cat(cut, dim=1).flatten(0, 2)

    return Reshape(there, back)


def experts_joined(maps: int) -> Reshape:
    """Maps of all experts as one [experts, inputs, outputs], of each expert `maps` side by side."""

    def there(x: Tensor) -> list[Tensor]:
        return [expert.T.contiguous() for part in x.chunk(maps, dim=2) for expert in part]

    def back(xs: list[Tensor]) -> Tensor:
        count = len(xs) // maps
        parts = [torch.stack([x.T for x in xs[n * count : (n + 1) * count]]) for n in range(maps)]
        return torch.cat(parts, dim=2)

    return Reshape(there, back)


def renames(theirs: str, ours: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """One rule for each published module and ours, below two prefixes."""
    return tuple(rule(f"{theirs}{a}.{{p}}", f"{ours}{b}.{{p}}") for a, b in names.items())


def ends(cfg: DecoderConfig, embedding: str, norm: str, head: str = "lm_head") -> KeyMap:
    """What lies around the blocks: the table, the last norm and, where it is not the table, the head."""
    outer = (rule(f"{embedding}.weight", "embedding.weight"), rule(f"{norm}.{{p}}", "norm.{p}"))
    if cfg.tied:
        return KeyMap(outer, ignore=(f"{head}.weight",))
    return KeyMap((*outer, rule(f"{head}.weight", "head.weight")))


LAYER, BLOCK = "model.layers.{i}.", "blocks.{i}."
NORMS = {
    "before": {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"},
    "after": {"input_layernorm": "after1", "post_attention_layernorm": "after2"},
    "both": {
        "input_layernorm": "norm1",
        "post_attention_layernorm": "after1",
        "pre_feedforward_layernorm": "norm2",
        "post_feedforward_layernorm": "after2",
    },
}
MAPS = {f"{x}_proj": x for x in "qkv"}


def decoder_keys(cfg: DecoderConfig, root: str = "model.", head: str = "lm_head.") -> KeyMap:
    """LLaMA, Mistral, Qwen2, Gemma and others share their names."""
    layer = f"{root}layers.{{i}}."
    attention = {**MAPS, "o_proj": "o", "q_norm": "q_norm", "k_norm": "k_norm"}
    rules = (
        *renames(f"{layer}self_attn.", f"{BLOCK}attention.", attention),
        *renames(f"{layer}mlp.", f"{BLOCK}feedforward.", {f"{x}_proj": x for x in ("gate", "up", "down")}),
        *renames(layer, BLOCK, NORMS[cfg.norm_at]),
    )
    outer = ends(cfg, f"{root}embed_tokens", f"{root}norm", head.removesuffix("."))
    return outer + KeyMap(rules, ignore=(f"{layer}self_attn.rotary_emb.inv_freq",))


def mixtral_keys(cfg: DecoderConfig) -> KeyMap:
    """Mixtral: LLaMA's names, and each expert's own."""
    moe, ours = f"{LAYER}block_sparse_moe.", f"{BLOCK}feedforward."
    experts = renames(f"{moe}experts.{{j}}.", f"{ours}experts.{{j}}.", {"w1": "gate", "w3": "up", "w2": "down"})
    return decoder_keys(cfg) + KeyMap((*experts, rule(f"{moe}gate.weight", f"{ours}router.weight")))


def stacked_experts(cfg: DecoderConfig, inner: str, outer: str) -> tuple[Rule, ...]:
    """Rules of experts published together, gates and ups side by side."""
    count = cfg.experts.count if cfg.experts else 0

    def names(x: str) -> list[str]:
        return [f"{BLOCK}feedforward.experts.{n}.{x}.weight" for n in range(count)]

    if not count:
        return ()
    return (
        rule(inner, *names("gate"), *names("up"), reshape=experts_joined(2)),
        rule(outer, *names("down"), reshape=experts_joined(1)),
    )


def aria_keys(cfg: DecoderConfig) -> KeyMap:
    """The text half of Aria, below `language_model.`."""
    mlp = f"{LAYER}mlp."
    shared = {f"shared_experts.{x}_proj": f"shared.{x}" for x in ("gate", "up", "down")}
    rules = renames(mlp, f"{BLOCK}feedforward.", {"router": "router", **shared})
    experts = stacked_experts(cfg, f"{mlp}experts.fc1.weight", f"{mlp}experts.fc2.weight")
    return decoder_keys(cfg) + KeyMap((*rules, *experts))


def llama4_keys(cfg: DecoderConfig) -> KeyMap:
    """The text half of Llama 4, below `language_model.`; its queries and keys are turned in neighbouring pairs."""
    mlp, gates = f"{LAYER}feed_forward.", ("gate", "up", "down")
    turned = half_apart(cfg.head_size)
    feedforward = {
        "router": "router",
        **{f"{x}_proj": x for x in gates},
        **{f"shared_expert.{x}_proj": f"shared.{x}" for x in gates},
    }
    rules = (
        *(rule(f"{LAYER}self_attn.{x}_proj.{{p}}", f"{BLOCK}attention.{x}.{{p}}", reshape=turned) for x in "qk"),
        *renames(f"{LAYER}self_attn.", f"{BLOCK}attention.", {"v_proj": "v", "o_proj": "o"}),
        *renames(mlp, f"{BLOCK}feedforward.", feedforward),
        *renames(LAYER, BLOCK, NORMS["before"]),
        *stacked_experts(cfg, f"{mlp}experts.gate_up_proj", f"{mlp}experts.down_proj"),
    )
    return ends(cfg, "model.embed_tokens", "model.norm") + KeyMap(rules)


def internlm2_keys(cfg: DecoderConfig) -> KeyMap:
    """InternLM2; `w1` is the gate, `w3` what it is multiplied with."""
    packed = grouped(cfg.heads // (cfg.kv_heads or cfg.heads), cfg.head_size)
    ours = [f"{BLOCK}attention.{x}.{{p}}" for x in "qkv"]
    names = {
        "attention.wo": "attention.o",
        "feed_forward.w1": "feedforward.gate",
        "feed_forward.w3": "feedforward.up",
        "feed_forward.w2": "feedforward.down",
        "attention_norm": "norm1",
        "ffn_norm": "norm2",
    }
    rules = (rule(f"{LAYER}attention.wqkv.{{p}}", *ours, reshape=packed), *renames(LAYER, BLOCK, names))
    return ends(cfg, "model.tok_embeddings", "model.norm", "output") + KeyMap(rules)


def qwen_keys(cfg: DecoderConfig) -> KeyMap:
    """Qwen; `w2` is the gate, `w1` what it is multiplied with."""
    layer, ours = "transformer.h.{i}.", [f"{BLOCK}attention.{x}.{{p}}" for x in "qkv"]
    names = {
        "attn.c_proj": "attention.o",
        "mlp.w2": "feedforward.gate",
        "mlp.w1": "feedforward.up",
        "mlp.c_proj": "feedforward.down",
        "ln_1": "norm1",
        "ln_2": "norm2",
    }
    rules = (rule(f"{layer}attn.c_attn.{{p}}", *ours, reshape=stacked(3)), *renames(layer, BLOCK, names))
    inner = KeyMap(rules, ignore=("transformer.rotary_emb.inv_freq", f"{layer}attn.masked_bias"))
    return ends(cfg, "transformer.wte", "transformer.ln_f") + inner


def persimmon_keys(cfg: DecoderConfig) -> KeyMap:
    """Persimmon; queries, keys and values lie head by head."""
    ours = [f"{BLOCK}attention.{x}.{{p}}" for x in "qkv"]
    names = {
        "self_attn.dense": "attention.o",
        "self_attn.q_layernorm": "attention.q_norm",
        "self_attn.k_layernorm": "attention.k_norm",
        "mlp.dense_h_to_4h": "feedforward.up",
        "mlp.dense_4h_to_h": "feedforward.down",
        **NORMS["before"],
    }
    packed = rule(f"{LAYER}self_attn.query_key_value.{{p}}", *ours, reshape=grouped(1, cfg.head_size))
    inner = KeyMap((packed, *renames(LAYER, BLOCK, names)), ignore=(f"{LAYER}self_attn.rotary_emb.inv_freq",))
    return ends(cfg, "model.embed_tokens", "model.final_layernorm") + inner


def opt_keys(cfg: DecoderConfig) -> KeyMap:
    """OPT."""
    layer = "model.decoder.layers.{i}."
    names = {
        **{f"self_attn.{theirs}": f"attention.{ours}" for theirs, ours in (*MAPS.items(), ("out_proj", "o"))},
        "self_attn_layer_norm": "norm1",
        "fc1": "feedforward.up",
        "fc2": "feedforward.down",
        "final_layer_norm": "norm2",
    }
    table = rule("model.decoder.embed_positions.weight", "positions.weight")
    outer = ends(cfg, "model.decoder.embed_tokens", "model.decoder.final_layer_norm")
    return outer + KeyMap((table, *renames(layer, BLOCK, names)))


def magneto_keys(cfg: DecoderConfig) -> KeyMap:
    """The text half of Kosmos-2, below `text_model.`."""
    names = {
        **{f"self_attn.{theirs}": f"attention.{ours}" for theirs, ours in (*MAPS.items(), ("out_proj", "o"))},
        "self_attn.inner_attn_ln": "attention.norm",
        "self_attn_layer_norm": "norm1",
        "ffn.fc1": "feedforward.up",
        "ffn.ffn_layernorm": "feedforward.norm",
        "ffn.fc2": "feedforward.down",
        "final_layer_norm": "norm2",
    }
    return ends(cfg, "model.embed_tokens", "model.layer_norm") + KeyMap(renames(LAYER, BLOCK, names))


def mpt_keys(cfg: DecoderConfig) -> KeyMap:
    """MPT."""
    names = {"norm_1": "norm1", "norm_2": "norm2", "ffn.up_proj": "feedforward.up", "ffn.down_proj": "feedforward.down"}
    return _mosaic(cfg, names, "norm_f")


def mosaic_keys(cfg: DecoderConfig) -> KeyMap:
    """MosaicGPT, from which MPT came."""
    names = {"attn.q_ln": "attention.q_norm", "attn.k_ln": "attention.k_norm", "ln_1": "norm1", "ln_2": "norm2"}
    return _mosaic(cfg, {**names, "mlp.mlp_up": "feedforward.up", "mlp.mlp_down": "feedforward.down"}, "ln_f")


def _mosaic(cfg: DecoderConfig, names: Mapping[str, str], last: str) -> KeyMap:
    """Of either, whose norms and feed-forward have these names; queries, keys and values lie below each other."""
    layer, ours = "transformer.blocks.{i}.", [f"{BLOCK}attention.{x}.{{p}}" for x in "qkv"]
    packed = rule(f"{layer}attn.Wqkv.{{p}}", *ours, reshape=stacked(3))
    rules = (packed, *renames(layer, BLOCK, {"attn.out_proj": "attention.o", **names}))
    return ends(cfg, "transformer.wte", f"transformer.{last}") + KeyMap(rules)


def gpt_neox_keys(cfg: DecoderConfig) -> KeyMap:
    """GPT-NeoX; queries, keys and values lie head by head."""
    layer, ours = "gpt_neox.layers.{i}.", [f"{BLOCK}attention.{x}.{{p}}" for x in "qkv"]
    names = {
        "attention.dense": "attention.o",
        "mlp.dense_h_to_4h": "feedforward.up",
        "mlp.dense_4h_to_h": "feedforward.down",
        **NORMS["before"],
    }
    packed = rule(f"{layer}attention.query_key_value.{{p}}", *ours, reshape=grouped(1, cfg.head_size))
    unused = ("rotary_emb.inv_freq", "bias", "masked_bias")
    inner = KeyMap((packed, *renames(layer, BLOCK, names)), ignore=tuple(f"{layer}attention.{x}" for x in unused))
    return ends(cfg, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out") + inner
