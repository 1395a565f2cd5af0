"""Published recipes at a size that trains in a moment: what each stage teaches, and what their processors make."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from sightline.core.geometry import Box, Frame
from sightline.core.layout import causal_layout
from sightline.core.sequence import Conversation, Image, Message, Region, Text
from sightline.data.images import PadSquare
from sightline.data.tiles import Pipeline
from sightline.language.decoder import Decoder
from sightline.language.tokenizer import Tokenizer, train_tokenizer
from sightline.model import VLM
from sightline.recipes import recipe
from sightline.training import checkpoints
from sightline.training.export import export
from sightline.training.recipe import Parts, Recipe, learning_rates
from sightline.training.run import initial_model, processor_config, run
from sightline.training.sources import FilesSource
from sightline.training.starting import load_start
from sightline.zoo import own, qwen_vl
from sightline.zoo.checkpoint import write
from sightline.zoo.families import FAMILIES, ROWS, habits_of, kind_of
from sightline.zoo.family import Row
from sightline.zoo.processors import load_processor
from sightline.zoo.published import load_published

ROWS_OF_TEXT = 1700  # ids of the tokenizers below, the longest of which is PaliGemma's
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 2, "image_size": 28}
TEXT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": ROWS_OF_TEXT}
MPT = {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": ROWS_OF_TEXT}
MAGNETO = {"embed_dim": 16, "layers": 2, "attention_heads": 2, "ffn_dim": 24, "vocab_size": ROWS_OF_TEXT}
QWEN = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_channels": 64}
QWEN |= {"intermediate_size": 48, "vocab_size": ROWS_OF_TEXT}
OPT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "vocab_size": ROWS_OF_TEXT}
QFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

# what of a published configuration is smaller, by its parts; Kosmos-2 keeps its 24 blocks, of which the last learns
SMALL: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {"vision_config": VISION, "text_config": TEXT},
    "blip2-opt-2.7b": {
        "vision_config": VISION,
        "text_config": OPT,
        "qformer_config": QFORMER,
        "image_token_index": 5,
        "num_query_tokens": 4,
    },
    "qwen-vl": {
        **QWEN,
        "visual": {
            "image_size": 28,
            "width": 16,
            "layers": 2,
            "heads": 2,
            "mlp_ratio": 2.0,
            "output_dim": 128,
            "n_queries": 4,
        },
    },
    "cogvlm-grounding-generalist": {
        **{key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "head_dim")},
        "num_key_value_heads": 2,
        "vision_config": {**VISION, "num_heads": 2},
    },
    "openflamingo-9b": {"vision_config": VISION, "text_config": MPT, "cross_attn_every_n_layers": 2},
    "internvl-chat-v1-5": {"vision_config": VISION, "llm_config": {**TEXT, "bias": False}},
    "paligemma-3b-pt-224": {"vision_config": VISION, "text_config": TEXT},
    "kosmos-2-patch14-224": {"vision_config": {**VISION, "num_hidden_layers": 24}, "text_config": MAGNETO},
}
RECIPES = {  # those whose stages differ, and the row that each is of
    "llava-1.5-7b": "llava-1.5-7b",
    "blip2-opt-2.7b": "blip2-opt-2.7b",
    "qwen-vl-224": "qwen-vl",
    "qwen-vl": "qwen-vl",
    "cogvlm-224": "cogvlm-grounding-generalist",
    "cogvlm": "cogvlm-grounding-generalist",
    "openflamingo-9b": "openflamingo-9b",
    "internvl-chat-v1-5": "internvl-chat-v1-5",
    "paligemma-3b-pt-224": "paligemma-3b-pt-224",
    "paligemma-3b-vqav2-224": "paligemma-3b-pt-224",
    "kosmos-2-patch14-224": "kosmos-2-patch14-224",
}
PLACES = ("<phrase>", "</phrase>", "<object>", "</object>", "</delimiter_of_multi_objects/>")
KOSMOS = ("<image>", "</image>", "<grounding>", *PLACES, *(f"<patch_index_{i:04d}>" for i in range(1024)))


@cache
def words(row: str, extra: tuple[str, ...]) -> Tokenizer:
    """A tokenizer with the control tokens that a family's has, and those that its recipe adds."""
    controls = ("<unk>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    more = KOSMOS if row.startswith("kosmos") else qwen_vl.CONTROLS if row == "qwen-vl" else ()
    named = tuple(dict.fromkeys((*controls, *more)))
    ends = {"bos": "<s>", "eos": "</s>"} if row.startswith("llava") else {}  # others say them in their habits
    return train_tokenizer(["which one is it? red"] * 30, 300 + len(named), named, **ends).extended(extra)


def smaller(config: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration with parts of it changed."""
    merged = {key: smaller(config.get(key, {}), new) if isinstance(new, dict) else new for key, new in changes.items()}
    return {**config, **merged}


def small(name: str) -> tuple[Recipe, Row, Tokenizer]:
    """A recipe of a small model of its kind, that model's row, and a tokenizer."""
    row, found = ROWS[RECIPES[name]], recipe(name)
    row = replace(row, config=smaller(row.config, SMALL[row.name]))
    pixels = cast(Pipeline, habits_of(row).pixels({}, 28))
    kept = PadSquare(28) if name.startswith("llava") else pixels  # whose recipe has a way of its own
    return (
        replace(found, model=row.model, pixels=kept, start="", max_length=512),
        row,
        words(row.name, found.added_tokens),
    )


def samples(folder: Path) -> FilesSource:
    """Two pictures with a question and an answer each."""
    rows = []
    for color in ("red", "blue"):
        PIL.Image.new("RGB", (60, 40), color).save(folder / f"{color}.png")
        turns = [{"from": "human", "value": "<image>\nwhich one is it?"}, {"from": "gpt", "value": color}]
        rows.append({"image": f"{color}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return FilesSource(kind="conversations", format="llava", path=str(folder / "rows.json"))


def short(found: Recipe, source: FilesSource) -> Recipe:
    """The same stages, two steps of two samples long and warm from the first."""
    cut = {"steps": 2, "batch": 2, "accumulate": 1, "group": 1, "warmup": 0, "warmups": {}, "precision": "fp32"}
    stages = tuple(replace(stage, **cut) for stage in found.stages)  # type: ignore[arg-type]
    kinds = {name: each.kind for name, each in found.sources.items() if isinstance(each, FilesSource)}
    return replace(found, stages=stages, sources={name: replace(source, kind=kind) for name, kind in kinds.items()})


def weights(folder: Path, stage: str) -> dict[str, Tensor]:
    kept = checkpoints.newest(folder / "checkpoints" / stage, print)
    assert kept is not None
    return kept.tensors["model"]


@pytest.mark.parametrize("name", RECIPES)
def test_each_trains_what_it_says_and_nothing_else(name: str, tmp_path: Path) -> None:
    found, _, tokenizer = small(name)
    chosen, folder = short(found, samples(tmp_path)), tmp_path / "run"
    tokenizer.save(folder / "tokenizer")
    assert [step.step for step in run(chosen, folder, workers=0)] == [1, 2] * len(chosen.stages)
    before = dict(initial_model(chosen).state_dict())
    for stage in chosen.stages:
        after = weights(folder, stage.name)
        moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
        model = VLM(chosen.model)
        assert moved <= set(learning_rates(model, stage.learn))
        for pattern, how in stage.learn.items():
            assert moved & set(learning_rates(model, {pattern: how})), pattern
        before = after
    where = export(chosen, folder, tmp_path / "model")
    published, processor = own.load(where)
    assert isinstance(published.model, VLM)
    picture = Image(PIL.Image.open(tmp_path / "red.png").convert("RGB"), "red")
    assert processor((Message("user", (picture, Text("which one is it?"))),)).length


def conversations(codec: str | None) -> list[Conversation]:
    picture = Image(PIL.Image.new("RGB", (90, 40), "red"), "red")
    asked = Message("user", (picture, Text("which one is it?")))
    told: tuple[Any, ...] = (Text("the red one"),)
    place = Region(Box(9, 4, 60, 30, Frame(90, 40), "red"))
    talks = [(asked,), (asked, Message("assistant", told))]
    return talks if codec is None else [*talks, (asked, Message("assistant", (place,)))]


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("llava")])
def test_its_processor_is_that_of_the_published_model(name: str, tmp_path: Path) -> None:
    found, row, tokenizer = small(name)
    folder, kind = tmp_path / "published", kind_of(row)
    c = {**row.config, "model_type": "qwen" if kind == "qwen_vl" else kind}
    if kind == "cogvlm":
        c = {**row.config, "architectures": ["CogVLMForCausalLM"]}
    write(folder, FAMILIES[kind].keys(found.model).save(VLM(found.model).state_dict()), c)
    tokenizer.save(folder)
    if kind == "qwen_vl":
        (folder / "generation_config.json").write_text('{"chat_format": "raw"}')
    loaded = load_published(folder)
    theirs = load_processor(loaded)
    assert theirs is not None and isinstance(loaded.model, VLM) and loaded.model.config == found.model
    ours = processor_config(found).build(Tokenizer.from_folder(folder), loaded.model)
    for talk in conversations(found.codec):
        a, b = ours(talk), theirs(talk)
        for field in ("ids", "labels", "slots", "block", "position", "medium", "item"):
            assert torch.equal(getattr(a, field), getattr(b, field)), field
        assert len(a.pixels) == len(b.pixels) > 0
        assert all(torch.equal(x, y) for x, y in zip(a.pixels, b.pixels, strict=True))
        assert a.transforms == b.transforms
    assert (ours.end, ours.image_id, ours.codec) == (theirs.end, theirs.image_id, theirs.codec)


def test_a_stage_may_have_conversations_of_another_kind() -> None:
    """Qwen-VL is instructed in ChatML and with its chat's places; LLaVA is aligned with captions alone."""
    found, _, tokenizer = small("qwen-vl")
    model = VLM(found.model)
    tasks, instruct = (processor_config(found, stage) for stage in found.stages)
    assert (tasks.template, tasks.codec) == ("qwen-vl", "qwen-vl")
    assert (instruct.template, instruct.codec) == ("qwen-vl-chat", "qwen-vl-chat")
    start = tokenizer.control("<|im_start|>")
    talk = conversations(None)[1]
    assert start in instruct.build(tokenizer, model)(talk).ids and start not in tasks.build(tokenizer, model)(talk).ids
    llava = recipe("llava-1.5-7b")
    assert [processor_config(llava, stage).template for stage in llava.stages] == ["llava-plain", "llava-v1"]


# ---------------------------------------------------------------------------------------------------------------- parts

PARTS: dict[str, tuple[str, str]] = {  # families of the folders that each begins from
    "blip2-opt-2.7b": ("blip_2_vision_model", "opt"),
    "qwen-vl-224": ("clip_vision_model", "qwen"),
    "cogvlm-224": ("", "llama"),
    "openflamingo-9b": ("clip_vision_model", "mpt"),
    "internvl-chat-v1-5": ("intern_vit_6b", "internlm2"),
    "paligemma-3b-pt-224": ("siglip_vision_model", "gemma"),
    "kosmos-2-patch14-224": ("clip_vision_model", ""),
}
OPEN_CLIP = {**VISION, "intermediate_size": 32, "patch_size": 14, "hidden_act": "gelu"}


def part(folder: Path, kind: str, c: dict[str, Any]) -> nn.Module:
    """A part in a folder of its own, in its published layout."""
    model = FAMILIES[kind].build(c, folder)
    write(folder, FAMILIES[kind].keys(model.config).save(model.state_dict()), {**c, "model_type": kind})  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("name", PARTS)
def test_each_begins_from_its_parts(name: str, tmp_path: Path) -> None:
    """Their weights are there as they are, their words as well, and new ones have rows at the end."""
    found, row, tokenizer = small(name)
    (seen, said), c, start = PARTS[name], row.config, Parts(tokenizer=str(tmp_path / "words"))
    train = words(row.name, ())
    train.save(tmp_path / "words")
    (tmp_path / "words" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    encoder = decoder = None
    if seen:
        encoder = part(tmp_path / "seen", seen, OPEN_CLIP if name.startswith("qwen") else c["vision_config"])
        start = replace(start, encoder=str(tmp_path / "seen"))
    if said:
        whole = {key: value for key, value in c.items() if key not in ("visual", "vision_config", "architectures")}
        text = c.get("text_config", c.get("llm_config", whole))
        rows = ROWS_OF_TEXT + (30 if said == "mpt" else -30)
        decoder = part(tmp_path / "said", said, {**text, "vocab_size": rows})
        start = replace(start, decoder=str(tmp_path / "said"))
    chosen = replace(short(found, samples(tmp_path)), start=start)
    model = initial_model(chosen)
    load_start(chosen, model)
    if encoder is not None:
        theirs = encoder.state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in model.encoder.state_dict().items() if k != "positions")
    if isinstance(decoder, Decoder) and isinstance(model.decoder, Decoder):
        ids, layout = torch.arange(20)[None], causal_layout(1, 20)
        with torch.no_grad():
            a, b = (each(each.embed(ids), layout) for each in (decoder, model.decoder))
            assert torch.allclose(a, b, atol=1e-6)
            known = min(decoder.config.vocab_size, ROWS_OF_TEXT)
            assert torch.allclose(decoder.logits(a)[..., :known], model.decoder.logits(b)[..., :known], atol=1e-5)
    folder = tmp_path / "run"
    assert len(list(run(chosen, folder, chosen.stages[0].name, workers=0))) == 2
    kept = Tokenizer.from_folder(folder / "tokenizer")
    assert [kept.control(token) for token in found.added_tokens] == [tokenizer.control(t) for t in found.added_tokens]
    learned, after = learning_rates(model, chosen.stages[0].learn), weights(folder, chosen.stages[0].name)
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items() if k not in learned)
