"""BLIP-2 (arXiv:2301.12597) and InstructBLIP (arXiv:2305.06500): EVA-CLIP g, a Q-Former, a language model.

The language model is OPT, Vicuna or FlanT5; the last reads the pictures in its encoder and writes beside it.

An InstructBLIP's Q-Former also reads the instruction, in the vocabulary of BERT; its language model reads its own.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.sequence import Conversation, Message
from ..data.batch import Batch
from ..data.template import End, Segment, Template, Words, Writer, spoken, turns
from ..fusion.qformer import QFormerConfig
from ..language.tokenizer import Tokenizer
from ..model import VLM, VLMConfig
from . import t5
from .backbones import eva_clip_config
from .configs import Json, act
from .encoder_names import eva_clip_keys
from .family import EQUAL, Family, Habits, Row, Stages, llama, stretched
from .inputs import shown, written
from .keymap import KeyMap, leading, rule
from .language_names import decoder_keys, opt_keys
from .languages import language_config


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json` of either; ConfigError where it does not say which id holds a picture's place."""
    if c.get("image_token_index") is None:
        raise ConfigError("config.json has no image_token_index; files of before 2024 need it, and a token for it")
    text = {"model_type": "opt", **c["text_config"]}
    decoder = t5.config(text) if text["model_type"] == "t5" else language_config(text)
    image = eva_clip_config(c.get("vision_config") or {})
    return VLMConfig(image=image, fusion=qformer_config(c, decoder.width), decoder=decoder)


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    assert isinstance(cfg.fusion, QFormerConfig)
    if cfg.beside:
        words = t5.keys(cfg.decoder)
    else:
        words = (opt_keys if cfg.decoder.positions == "learned" else decoder_keys)(cfg.decoder)  # OPT, or Vicuna
    return (
        eva_clip_keys(cfg.vit).under("vision_model.", "encoder.")
        + qformer_keys(cfg.fusion).under("", "fusion.")
        + words.under("language_model.", "decoder.")
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
    decoder_input_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> Batch:
    """InstructBLIP's: with each picture the ids [pictures, words] of what its Q-Former reads, and their mask."""
    batch = shown(model, c, input_ids, pixel_values, attention_mask, token_type_ids)
    ids, mask, reads = qformer_input_ids, qformer_attention_mask, model.config.fusion
    if ids is None:
        return written(model, batch, decoder_input_ids)
    assert isinstance(reads, QFormerConfig)
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"qformer_attention_mask is {list(mask.shape)}, expected {list(ids.shape)} as its ids")
    if ids.dim() != 2 or int(ids.min()) < 0 or int(ids.max()) >= reads.vocab_size:
        raise InputError(f"qformer_input_ids: expected ids [images, words] from 0 to {reads.vocab_size - 1}")
    batch = replace(batch, instruction=ids if mask is None else ids.masked_fill(mask == 0, -1))
    return written(model, batch, decoder_input_ids)


# ---------------------------------------------------------------------------------------------------------- processor


def blip2_template(begin: str, end: str = "") -> Template:
    """BLIP-2: pictures, then "Question: … Answer:" for each turn; begin: the token after the pictures, if any.

    end: the token after the words of what is read apart; without one the answer follows and a line break ends it.
    """

    def template(conversation: Conversation) -> list[Segment]:
        out, talk = _pictures_first(conversation, begin), turns(conversation)
        for i, message in enumerate(talk):
            if message.role == "user":
                out.words(" Question: " if i else "Question: ")
                _words(out, message)
                out.words(" Answer:")
            elif i + 1 < len(talk):
                out.words(" ")
                _words(out, message)
                out.words(".")
        if end:
            out.control(end)
        if talk[-1].role == "assistant":
            out.parts(talk[-1], learned=True, before="" if end else " ")
            out.segments.append(End(end) if end else Words("\n", learned=True))
        return out.segments

    return template


def instructblip_template(begin: str, end: str = "") -> Template:
    """InstructBLIP: pictures, then the question as it is; begin and end: the tokens around its words, if any."""

    def template(conversation: Conversation) -> list[Segment]:
        out, talk = _pictures_first(conversation, begin), turns(conversation)
        if len(talk) > 2:
            raise InputError(f"this model answers one question, the conversation has {len(talk)} messages")
        _words(out, talk[0])
        if end:
            out.control(end)
        if len(talk) == 2:
            out.parts(talk[1], learned=True)
            out.segments.append(End("</s>"))
        return out.segments

    return template


def _pictures_first(conversation: Conversation, begin: str) -> Writer:
    """The pictures of a conversation, wherever they stand in it, and the token after them."""
    out = Writer()
    for message in spoken(conversation):
        out.shown(message)
    if begin:
        out.control(begin)
    return out


def _words(out: Writer, message: Message) -> None:
    """A message's parts without its pictures."""
    out.parts(Writer().shown(message))


def _habits(
    make: Callable[[str, str], Template],
    line: str = "",
    instruct: Callable[[Path], Callable[[str], list[int]]] | None = None,
) -> Callable[[Json, Path, Tokenizer], Habits]:
    """What the processor of either does; line: what ends the answers of a model that writes where it has read.

    The words of OPT and Vicuna begin with the token that the folder's tokenizer names, those of T5 end with one.
    """

    def found(c: Json, folder: Path, tokenizer: Tokenizer) -> Habits:
        kind = c["text_config"].get("model_type", "opt")
        if kind == "t5":
            return Habits(make("", "</s>"), "<image>", bos="", pixels=stretched, instruct=instruct)
        begin = tokenizer.bos or ("</s>" if kind == "opt" else "<s>")
        return Habits(make(begin, ""), "<image>", bos=begin, end=line, pixels=stretched, instruct=instruct)

    return found


def bert_words(folder: Path) -> Callable[[str], list[int]]:
    """How the Q-Former of an InstructBLIP reads a question: in BERT's words, between its two tokens."""
    bert = Tokenizer.from_folder(folder / "qformer_tokenizer")
    return lambda text: [bert.control("[CLS]"), *bert.encode(text), bert.control("[SEP]")]


FAMILIES = {
    "blip-2": Family(lambda c, f: VLM(config(c)), keys, habits=_habits(blip2_template, line="\n")),
    "instructblip": Family(
        lambda c, f: VLM(config(c)),
        keys,
        inputs=instructed,
        habits=_habits(instructblip_template, instruct=bert_words),
    ),
}

# EVA-CLIP g without its last block; the published configuration class has the same sizes by default
EVA_G = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16}
STAGES: Stages = {  # arXiv:2301.12597 section 3; the map to the decoder's width waits for the second
    "represent": ("fusion.queries", "fusion.norm.*", "fusion.layers.*"),
    "generate": ("fusion.*",),
}


def flan_t5(size: str) -> dict[str, Any]:
    """FlanT5's sizes (arXiv:2210.11416), with the gate that BLIP-2's were trained with."""
    width, heads, mlp = {"xl": (2048, 32, 5120), "xxl": (4096, 64, 10240)}[size]
    text = {"model_type": "t5", "d_model": width, "num_heads": heads, "d_ff": mlp, "num_layers": 24, "d_kv": 64}
    gate = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}
    return {**text, **gate, "vocab_size": 32128, "tie_word_embeddings": False}


def _flan_t5(row: Row, size: str, **changes: Any) -> Row:
    """The row with a FlanT5 as its language model, which reads the pictures in its encoder."""
    name = f"{row.family.lower().replace('-', '')}-flan-t5-{size}"
    sizes = {**row.config, "text_config": flan_t5(size), "image_token_index": 32100}
    words = f"FlanT5 {size.upper()}"
    return replace(row, name=name, source=f"Salesforce/{name}", llm=words, config=sizes, **changes)


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
        proof=EQUAL,
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
        proof=EQUAL,
    )


ROWS = (
    _blip_2("2.7b"),
    _blip_2("6.7b"),
    *(_flan_t5(_blip_2("2.7b"), size) for size in ("xl", "xxl")),
    _instructblip("7b"),
    _instructblip("13b"),
    *(_flan_t5(_instructblip("7b"), size, licence="MIT") for size in ("xl", "xxl")),
)
