"""T5 (arXiv:1910.10683) and FlanT5 (arXiv:2210.11416): settings, names, and how their inputs are read."""

from torch import Tensor

from ..core.errors import ConfigError
from ..data.batch import Batch
from ..language.seq2seq import Seq2Seq, Seq2SeqConfig
from .configs import Json, act
from .family import Family
from .inputs import words, written
from .keymap import KeyMap, rule
from .language_names import renames


def config(c: Json) -> Seq2SeqConfig:
    """Settings from a `config.json`; the first T5 is tied and not gated, later ones say that they are not tied.

    Where both are said, `dense_act_fn` is what is computed: BLIP-2 was trained with the exact GELU of a FlanT5's gate.
    """
    kind = c.get("feed_forward_proj", "relu")
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    if (count := c.get("is_encoder_decoder", True)) is not True:
        raise ConfigError(f"is_encoder_decoder is {count!r}, expected an encoder and a decoder")
    depth = c.get("num_layers", 6)
    return Seq2SeqConfig(
        vocab_size=c.get("vocab_size", 32_128),
        width=c.get("d_model", 512),
        encoder_depth=depth,
        decoder_depth=c.get("num_decoder_layers") or depth,
        heads=c.get("num_heads", 8),
        head_dim=c.get("d_kv", 64),
        mlp=c.get("d_ff", 2048),
        # "gated-gelu" has always meant the approximation
        activation=act(c.get("dense_act_fn") or ("gelu_new" if kind == "gated-gelu" else name)),
        gated=gated,
        eps=c.get("layer_norm_epsilon", 1e-6),
        buckets=c.get("relative_attention_num_buckets", 32),
        farthest=c.get("relative_attention_max_distance", 128),
        tied=c.get("tie_word_embeddings", True) and c.get("scale_decoder_outputs", True),
        start_id=c.get("decoder_start_token_id") or 0,
        max_length=c.get("n_positions", 512),
    )


def keys(cfg: Seq2SeqConfig) -> KeyMap:
    """Sublayers are numbered: attention, in the decoder the look at the encoder, feed-forward."""
    feedforward = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if cfg.gated else {"wi": "up", "wo": "down"}
    attention = {x: x for x in "qkvo"}
    rules = [rule("shared.weight", "embedding.weight")]
    for side, ours, last in (("encoder", "encoder_", 1), ("decoder", "", 2)):
        layer, block = f"{side}.block.{{i}}.layer.", f"{ours}blocks.{{i}}."
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules += [
            *renames(f"{layer}0.SelfAttention.", f"{block}attention.", attention),
            *renames(f"{layer}{last}.DenseReluDense.", f"{block}feedforward.", feedforward),
            *renames(layer, block, {"0.layer_norm": "norm1", f"{last}.layer_norm": "norm2"}),
            rule(table, f"{ours}bias.table.weight"),
            rule(f"{side}.final_layer_norm.{{p}}", f"{ours}norm.{{p}}"),
        ]
    looks = "decoder.block.{i}.layer.1."
    rules += renames(f"{looks}EncDecAttention.", "blocks.{i}.cross.", attention)
    rules += renames(looks, "blocks.{i}.", {"layer_norm": "norm_cross"})
    unused = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    unused += [f"{looks}EncDecAttention.relative_attention_bias.weight"]
    if cfg.tied:
        unused.append("lm_head.weight")
    else:
        rules.append(rule("lm_head.weight", "head.weight"))
    return KeyMap(tuple(rules), tuple(unused))


def inputs(
    model: Seq2Seq,
    c: Json,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
) -> Batch:
    """Ids that are read, and those written so far, at first the start token."""
    return written(model, words(model, c, input_ids, attention_mask, token_type_ids), decoder_input_ids)


FAMILIES = {"t5": Family(lambda c, f: Seq2Seq(config(c)), keys, inputs=inputs)}
