"""InternVL in both its layouts against transformers; every picture, and every tile of one, is an item."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers as hf
from published_folders import (
    IMAGE_TOKEN,
    TEXT,
    VISION,
    layout_1,
    layout_2,
    original_internvit,
    pixels,
    randomised,
    saved,
    write,
)
from torch import Tensor

from sightline.core.errors import ConfigError, InputError
from sightline.core.sequence import Image, Message, Text, Video, ask
from sightline.data.template import End, Words
from sightline.zoo import internvl as family
from sightline.zoo.published import load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
SLOTS = 4  # (28 / 7) squared, four in one
TOWERS = {
    "qwen2": {"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True},  # as the 300M's
    "llama": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},  # as the 6B's
}


def internvl(text: str = "llama", bias: bool = False, **more: Any) -> Any:
    language = hf.Qwen2Config(**TEXT) if text == "qwen2" else hf.LlamaConfig(**TEXT, attention_bias=bias)
    config = hf.InternVLConfig(
        vision_config={**VISION, **TOWERS[text]},
        text_config=language,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=SLOTS,
        **{"tie_word_embeddings": False, **more},
    )
    return randomised(hf.InternVLForConditionalGeneration(config))


def inputs(*tiles: int) -> dict[str, Tensor]:
    """Words around pictures of so many tiles each."""
    words = torch.randint(3, 90, (12,), generator=torch.Generator().manual_seed(1))
    parts = [words[:1]]
    for count in tiles:
        parts += [torch.full((count * SLOTS,), IMAGE_TOKEN), words[1:3]]
    given = {"input_ids": torch.cat([*parts, words[3:]])[None]}
    return given | ({"pixel_values": pixels(sum(tiles))} if tiles else {})


def compare(theirs: Any, ours: Any, given: dict[str, Tensor]) -> None:
    """Logits within 1e-4 and 32 greedy tokens equal."""
    with torch.no_grad():
        wanted = theirs(**given).logits
        greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)[:, given["input_ids"].shape[1] :]
    torch.testing.assert_close(ours.logits(**given), wanted, **TOLERANCE)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy)


def without_vision_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layouts of LLaVA's files, but for the name that only CLIP's tower has."""
    return {k.replace("vision_tower.vision_model.", "vision_tower."): v for k, v in tensors.items()}


@pytest.mark.parametrize("tiles", [(), (1,), (3,), (1, 2)], ids=str)
@pytest.mark.parametrize("text", TOWERS)
def test_any_number_of_tiles(tmp_path: Path, text: str, tiles: tuple[int, ...]) -> None:
    theirs = internvl(text)
    ours = load_published(saved(theirs, tmp_path))
    given = inputs(*tiles)
    compare(theirs, ours, given)
    if tiles:  # the pictures are seen
        other = {**given, "pixel_values": pixels(sum(tiles), seed=5)}
        assert (ours.logits(**other) - ours.logits(**given)).abs().max() > 0.01


@pytest.mark.parametrize("layout", [layout_1, layout_2])
def test_layouts_give_the_same_model(tmp_path: Path, layout: Any) -> None:
    theirs = internvl()
    ours = load_published(write(tmp_path, theirs.config.to_dict(), without_vision_model(layout(theirs))))
    compare(theirs, ours, inputs(2))


def test_an_earlier_layer(tmp_path: Path) -> None:
    theirs = internvl(vision_feature_layer=-2)
    compare(theirs, load_published(saved(theirs, tmp_path)), inputs(2))


def test_a_head_that_is_the_table_is_in_the_file_once(tmp_path: Path) -> None:
    """As transformers 5 ties words unless it is told otherwise, whatever the text half says."""
    theirs = internvl("qwen2", tie_word_embeddings=True)
    ours = load_published(saved(theirs, tmp_path / "theirs"))
    compare(theirs, ours, inputs(1))
    ours.save(tmp_path / "ours")
    again = hf.InternVLForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs(1)).logits, theirs(**inputs(1)).logits)


def test_left_padded_batch(tmp_path: Path) -> None:
    theirs = internvl("qwen2")
    ours = load_published(saved(theirs, tmp_path))
    long, short = inputs(3)["input_ids"], inputs(1)["input_ids"]
    gap = long.shape[1] - short.shape[1]
    ids = torch.cat([long, torch.cat([torch.zeros(1, gap, dtype=torch.int64), short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :gap] = 0
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(4)}
    with torch.no_grad():
        wanted = theirs(**given).logits
        greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)[:, ids.shape[1] :]
    torch.testing.assert_close(ours.logits(**given)[mask.bool()], wanted[mask.bool()], **TOLERANCE)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy)


@pytest.mark.parametrize("text", TOWERS)
def test_what_we_save_loads_in_transformers_and_here(tmp_path: Path, text: str) -> None:
    theirs = internvl(text)
    ours = load_published(saved(theirs, tmp_path / "theirs"))
    ours.save(tmp_path / "ours")
    kind = hf.InternVLForConditionalGeneration
    again, told = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    given = inputs(2)
    with torch.no_grad():
        assert torch.equal(again.eval()(**given).logits, theirs(**given).logits)
    assert torch.equal(load_published(tmp_path / "ours").logits(**given), ours.logits(**given))


# -------------------------------------------------------------------------------------------------- original layout


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two queries, their key and their value, one group after another."""
    heads = [x.unflatten(0, (2, -1, 8)) for x in (q, k, v)]
    return torch.cat(heads, dim=1).flatten(0, 2)


def internlm2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LLaMA's tensors by the names of InternLM2."""
    renamed = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    out = {}
    for key, value in tensors.items():
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            value = packed(*(tensors[key.replace("q_proj", f"{x}_proj")] for x in "qkv"))
            key = key.replace("self_attn.q_proj", "attention.wqkv")
        for old, new in renamed.items():
            key = key.replace(old, new)
        out[key] = value
    return out


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def original(theirs: Any, folder: Path, **more: Any) -> Path:
    """The same model as OpenGVLab/InternVL writes it."""
    tensors, text = without_vision_model(layout_1(theirs)), theirs.config.text_config
    words = part(tensors, "language_model.")
    kind = {"llama": "internlm2"}.get(text.model_type, text.model_type)
    bridge = part(tensors, "multi_modal_projector.")
    for new, old in (("0.", "layer_norm."), ("1.", "linear_1."), ("3.", "linear_2.")):
        bridge = {key.replace(old, new): value for key, value in bridge.items()}
    tower = TOWERS[text.model_type]
    named = {"qkv_bias": tower["attention_bias"], "qk_normalization": tower["use_qk_norm"]}
    config = {
        "model_type": "internvl_chat",
        "vision_config": {**VISION, **named, "norm_type": tower["norm_type"], "model_type": "intern_vit_6b"},
        "llm_config": {**text.to_dict(), "model_type": kind, "bias": getattr(text, "attention_bias", False)},
        "downsample_ratio": 0.5,
        "select_layer": theirs.config.vision_feature_layer,
        **more,
    }
    everything = {
        **under("vision_model.", original_internvit(part(tensors, "vision_tower."))),
        **under("mlp1.", bridge),
        **under("language_model.", internlm2(words) if kind == "internlm2" else words),
    }
    return write(folder, config, everything)


def placed(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original configuration names no token for pictures; -1 holds their places."""
    ids = given["input_ids"]
    return {**given, "input_ids": torch.where(ids == IMAGE_TOKEN, -1, ids)}


@pytest.mark.parametrize(("text", "bias", "layer"), [("llama", False, -1), ("llama", True, -2), ("qwen2", False, -1)])
def test_original_layout(tmp_path: Path, text: str, bias: bool, layer: int) -> None:
    theirs = internvl(text, bias, vision_feature_layer=layer)
    ours = load_published(original(theirs, tmp_path / "original", ps_version="v2"))
    same = load_published(saved(theirs, tmp_path / "theirs"))
    for given in (inputs(), inputs(1), inputs(3)):
        with torch.no_grad():
            wanted = theirs(**given).logits
        torch.testing.assert_close(ours.logits(**placed(given)), wanted, **TOLERANCE)
        assert torch.equal(ours.logits(**placed(given)), same.logits(**given))
        with torch.no_grad():
            greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)[:, given["input_ids"].shape[1] :]
        assert torch.equal(ours.generate_ids(**placed(given), max_new_tokens=32), greedy)
    ours.save(tmp_path / "ours")
    assert torch.equal(load_published(tmp_path / "ours").logits(**placed(given)), ours.logits(**placed(given)))


@pytest.mark.parametrize("more", [{"ps_version": "v1"}, {}], ids=str)
def test_the_first_order_of_squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, str]) -> None:
    """Column by column; so does a file that names no order."""
    theirs = internvl()
    ours = load_published(original(theirs, tmp_path, **more))
    given = inputs(2)
    with torch.no_grad():
        second, shuffle = theirs(**given).logits, theirs.model.pixel_shuffle
        monkeypatch.setattr(theirs.model, "pixel_shuffle", lambda *a, **k: shuffle(*a, **k).transpose(1, 2))
        wanted = theirs(**given).logits
    assert (wanted - second).abs().max() > 0.01
    torch.testing.assert_close(ours.logits(**placed(given)), wanted, **TOLERANCE)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full', expected 'default'"),
        (
            {"vision_feature_layer": [-2, -1]},
            r"vision_feature_layer \[-2, -1\], expected one layer counted from",
        ),
        ({"vision_feature_layer": 3}, "vision_feature_layer 3, expected one layer"),
    ],
)
def test_what_transformers_does_not_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family.config({"vision_config": VISION, "text_config": {"model_type": "llama", **TEXT}, **change})


def test_other_languages_of_the_original_layout_are_refused() -> None:
    with pytest.raises(ConfigError, match="llm_config of type 'llama', expected 'internlm2' or 'qwen2'"):
        family.original_config({"vision_config": VISION, "llm_config": {"model_type": "llama", **TEXT}})


def test_the_slot_s_id_is_the_tokenizer_s(tmp_path: Path) -> None:
    """Published ids of the original layout, by either file that names it; the model saved alone keeps it."""
    theirs = internvl()
    given = inputs(2)
    with torch.no_grad():
        wanted = theirs(**given).logits
    files = {
        "tokenizer.json": {"added_tokens": [{"id": IMAGE_TOKEN, "content": "<IMG_CONTEXT>"}]},
        "added_tokens.json": {"<IMG_CONTEXT>": IMAGE_TOKEN},
    }
    for name, content in files.items():
        folder = original(theirs, tmp_path / name.split(".")[0], ps_version="v2")
        (folder / name).write_text(json.dumps(content))
        ours = load_published(folder)
        torch.testing.assert_close(ours.logits(**given), wanted, **TOLERANCE)
        with pytest.raises(InputError, match="0 image tokens in input_ids, the pictures need 8"):
            ours.logits(**placed(given))
    ours.save(tmp_path / "alone")
    torch.testing.assert_close(load_published(tmp_path / "alone").logits(**given), wanted, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "kind", "begins", "between"),
    [
        ("internlm2-chat", "internlm2", "<s><|im_start|>system\n你是由上海", "<|im_end|><|im_start|>"),
        ("Hermes-2", "qwen2", "<|im_start|>system\n你是由上海", "<|im_end|><|im_start|>"),
        ("internvl2_5", "qwen2", "<|im_start|>system\n你是书生", "<|im_end|>\n<|im_start|>"),
    ],
)
def test_conversations_of_the_original_layout(name: str, kind: str, begins: str, between: str) -> None:
    habits = family.original_habits({"template": name, "llm_config": {"model_type": kind}})
    image = Image(PIL.Image.new("RGB", (8, 8)))
    film = Video((image, image), (0.0, 1.0))
    talk = (Message("user", (image, film, Text("how?"))), Message("assistant", (Text("so"),)))
    segments = habits.template((*talk, *ask("why?")))
    shown = "".join(getattr(s, "text", getattr(s, "name", "#")) for s in segments)
    asked = f"{between}user\n#\nFrame1: #\nFrame2: #\nhow?{between}assistant\nso{between}user\nwhy?{between}assistant\n"
    assert shown.startswith(begins) and shown.endswith(asked)
    assert [s for s in segments if getattr(s, "learned", False) or isinstance(s, End)] == [
        Words("so", learned=True),
        End("<|im_end|>"),
    ]
    with pytest.raises(ConfigError, match="template 'phi3-chat'"):
        family.original_habits({"template": "phi3-chat", "llm_config": {"model_type": kind}})
