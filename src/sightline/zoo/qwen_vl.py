"""Qwen-VL (arXiv:2308.12966): OpenCLIP's ViT-bigG, a pool of queries that know their places, the first Qwen.

Its files say that they are a Qwen's; a part `visual` tells them apart. Its tokenizer is a file of tiktoken.
"""

from pathlib import Path

from torch import Tensor

from ..core.errors import InputError
from ..core.sequence import Conversation, Image, Message, Text, Video
from ..data.batch import Batch
from ..data.processor import tagged
from ..data.template import End, Segment, Template, Writer, turns
from ..fusion.pooling import PositionPoolConfig
from ..language.tokenizer import Tokenizer
from ..model import VLM, VLMConfig
from .backbones import vit_bigg_config
from .checkpoint import read_json
from .configs import Json
from .encoder_names import vit_bigg_keys
from .family import Family, Habits, Row, Stages, stretched_for_encoder, tokenizer_json
from .inputs import checked, cut, filled
from .keymap import KeyMap, flipped, rule, stacked
from .language_names import qwen_keys
from .languages import qwen_config


def config(c: Json) -> VLMConfig:
    """Settings from a `config.json`."""
    return VLMConfig(vit_bigg_config(c["visual"]), pool_config(c), qwen_config(c))


def keys(cfg: VLMConfig) -> KeyMap:
    """The published names."""
    return (
        vit_bigg_keys(cfg.vit).under("transformer.visual.", "encoder.")
        + pool_keys().under("transformer.visual.", "fusion.")
        + qwen_keys(cfg.decoder).under("", "decoder.")
    )


def pool_config(c: Json) -> PositionPoolConfig:
    """From the `visual` part of its `config.json`; a head has 128 numbers, queries fill a square."""
    visual = c["visual"]
    width, queries = int(visual["output_dim"]), int(visual.get("n_queries", 256))
    return PositionPoolConfig(inputs=visual["width"], width=width, heads=max(width // 128, 1), side=round(queries**0.5))


def pool_keys() -> KeyMap:
    """The published names, below `transformer.visual.`."""
    pool = "attn_pool."
    return KeyMap(
        (
            rule(f"{pool}query", "queries"),
            rule(f"{pool}pos_embed", "positions"),
            rule(f"{pool}kv_proj.{{p}}", "project.{p}"),
            rule(f"{pool}ln_q.{{p}}", "norm_queries.{p}"),
            rule(f"{pool}ln_kv.{{p}}", "norm_features.{p}"),
            rule(f"{pool}attn.in_proj_{{p}}", *(f"attention.{x}.{{p}}" for x in "qkv"), reshape=stacked(3)),
            rule(f"{pool}attn.out_proj.{{p}}", "attention.o.{p}"),
            rule("ln_post.{p}", "norm.{p}"),
            rule("proj", "out.weight", reshape=flipped()),
        )
    )


def inputs(
    model: VLM,
    c: Json,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> Batch:
    """Ids in which a picture stands between `<img>` and `</img>`, and pictures [n, 3, height, width] in their order.

    The published code opens the file whose path is spelled there in bytes; here those ids only hold the places.
    """
    ids = checked(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
    begin = int(c["visual"]["image_start_id"])
    starts, stops = ids == begin, ids == begin + 1
    within = starts.cumsum(1) - stops.cumsum(1)  # 1 from `<img>` to before `</img>`
    if bool(((within < 0) | (within > 1)).any()) or bool(within[:, -1].any()):
        raise InputError("<img> and </img> do not come in pairs in input_ids")
    patches = None if pixel_values is None else cut(model, pixel_values)
    lengths = (stops.flatten().nonzero() - starts.flatten().nonzero() - 1).flatten().tolist()
    if patches is not None and lengths != (wanted := [model.num_tokens(grid) for grid in patches.grids]):
        raise InputError(f"{lengths} ids between <img> and </img>, the pictures need {wanted}")
    return filled(model, ids, (within == 1) & ~starts, patches, attention_mask)


# ---------------------------------------------------------------------------------------- conversations and words

SYSTEM = "You are a helpful assistant."
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROLS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)


def chatml(conversation: Conversation) -> list[Segment]:
    """Qwen-VL-Chat's: `<|im_start|>` role, line break, text `<|im_end|>`; pictures are numbered in lines of their own.

    A role and the text after it are separate texts to its tokenizer, which could join their line breaks.
    """
    out = Writer()
    said = "".join(message.text for message in conversation if message.role == "system") or SYSTEM
    talk = turns(conversation)
    for message in (Message("system", (Text(said),)), *talk):
        out.control("<|im_start|>")
        out.words(f"{message.role}\n")
        text = Writer(images=out.images)
        learned = message.role == "assistant"
        for part in message.parts:
            for _ in range(len(part.frames) if isinstance(part, Video) else int(isinstance(part, Image))):
                text.words(f"Picture {text.images + 1}: ")
                text.image()
                text.words("\n")
            if not isinstance(part, (Image, Video)):
                text.parts(Message(message.role, (part,)), learned)
        out.segments += text.segments
        out.images = text.images
        if learned:
            out.segments.append(End("<|im_end|>"))
        else:
            out.control("<|im_end|>")
        out.words("\n", learned)
    if talk[-1].role == "user":
        out.control("<|im_start|>")
        out.words("assistant\n")
    return out.segments


def raw(conversation: Conversation) -> list[Segment]:
    """Qwen-VL's: pictures and words as they come, which the model continues."""
    if len(conversation) > 2 or len(turns(conversation)) < len(conversation):
        raise InputError("this model continues one text, expected neither a system message nor further turns")
    out = Writer()
    out.parts(conversation[0])
    if len(conversation) == 2:
        out.parts(conversation[1], learned=True)
        out.segments.append(End("<|endoftext|>"))
    return out.segments


def words_of(folder: Path) -> Tokenizer | None:
    """From `tokenizer.json` or, as it is published, `qwen.tiktoken`."""
    path = folder / "qwen.tiktoken"
    if path.exists() and not (folder / "tokenizer.json").exists():
        return Tokenizer.from_tiktoken(path, WORDS, CONTROLS)
    return tokenizer_json(folder)


def habits(c: Json, folder: Path, tokenizer: Tokenizer) -> Habits:
    """Those of the chat model or, where `generation_config.json` says that text is raw, of the one it was made from."""
    path = folder / "generation_config.json"
    chat = not path.exists() or read_json(path).get("chat_format") != "raw"
    return _habits(chatml, "qwen-vl-chat", "<|im_end|>") if chat else RAW


def _habits(template: Template, codec: str, end: str) -> Habits:
    picture = tagged("<img>", "</img>")
    return Habits(template, "<imgpad>", codec, bos="", end=end, pixels=stretched_for_encoder, expand=picture)


RAW = _habits(raw, "qwen-vl", "<|endoftext|>")


# ------------------------------------------------------------------------------------------------- families and rows

FAMILIES = {"qwen_vl": Family(lambda c, f: VLM(config(c)), keys, inputs=inputs, tokenizer=words_of, habits=habits)}

# arXiv:2308.12966 section 3 and table 8
STAGES: Stages = {"pretrain": ("encoder.*", "fusion.*"), "multi-task": ("*",)}
VISUAL = {"image_size": 448, "patch_size": 14, "width": 1664, "layers": 48, "heads": 16, "mlp_ratio": 4.9231}
VISUAL |= {"output_dim": 4096, "image_start_id": 151_857}
QWEN_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128}
QWEN_7B |= {"intermediate_size": 22_016, "vocab_size": 151_936, "seq_length": 2048, "max_position_embeddings": 8192}


def _row(name: str, source: str, stages: Stages, habits: Habits | None = None) -> Row:
    return Row(
        name=name,
        family="Qwen-VL",
        encoder="OpenCLIP ViT-bigG/14 448",
        fusion="pool of 256 queries with places",
        llm="Qwen 7B",
        licence="Tongyi Qianwen",
        source=source,
        read=config,
        config={"model_type": "qwen", **QWEN_7B, "visual": VISUAL},
        stages=stages,
        proof="logits and greedy tokens equal golden values of the published code on random weights",
        habits=habits,
    )


ROWS = (
    _row("qwen-vl", "Qwen/Qwen-VL", STAGES, RAW),
    _row("qwen-vl-chat", "Qwen/Qwen-VL-Chat", {**STAGES, "instruct": ("fusion.*", "decoder.*")}),
)
