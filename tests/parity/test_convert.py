"""What `convert` writes, read by transformers: the same scores, tokens, ids and pixels."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf
from published_folders import TEXT, VISION, layout_1, llava, original, write

import sightline
from sightline.core.sequence import Image, Message, Text, ask
from sightline.data.images import CenterCrop, PadSquare, Square
from sightline.encoders.vit import ViTConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.tokenizer import Tokenizer, train_tokenizer
from sightline.layers.rotary import RopeScaling
from sightline.model import VLM, VLMConfig
from sightline.zoo import own
from sightline.zoo.convert import convert
from sightline.zoo.processors import load_processor
from sightline.zoo.published import load_published

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
CONTROLS = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>")
IMAGE = ViTConfig(image_size=28, patch_size=7, width=32, depth=3, heads=4, mlp=48, normed=False)
CLIP = replace(IMAGE, class_token=True, pre_norm=True, patch_bias=False, layer=-2, activation="quick_gelu")
PROJECTOR = ProjectorConfig(inputs=32, width=36)
DECODER = DecoderConfig(vocab_size=300, width=36, depth=2, heads=3, mlp=48, max_length=128)
OURS = replace(DECODER, qk_norm=True, tied=True, scale_embedding=True)  # as in the default model
DESIGNS: dict[str, VLMConfig] = {
    "of the default decoder": VLMConfig(IMAGE, PROJECTOR, OURS),
    "of a narrow projector": VLMConfig(IMAGE, replace(PROJECTOR, hidden=20, activation="silu"), OURS),
    "of a linear map": VLMConfig(IMAGE, replace(PROJECTOR, layers=1), replace(DECODER, kv_heads=1, qkv_bias=True)),
    "of CLIP and LLaMA": VLMConfig(CLIP, PROJECTOR, replace(DECODER, tied=True, head_dim=16)),
    "of two layers and the class token": VLMConfig(
        replace(CLIP, keep_prefix=True, layer=(-1, -3)), replace(PROJECTOR, inputs=64, bias=False), DECODER
    ),
    "of an encoder without a last norm": VLMConfig(replace(IMAGE, normed=True, final_norm=False), PROJECTOR, DECODER),
    "of norms from one and a GELU": VLMConfig(
        IMAGE, PROJECTOR, replace(DECODER, norm_offset=True, activation="gelu_tanh", scale_embedding=True)
    ),
    "of stretched positions": VLMConfig(
        IMAGE, PROJECTOR, replace(DECODER, rope_scaling=RopeScaling("linear", 2.0, 128), rope_theta=5e4)
    ),
}
JINJA = (
    "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}{% endfor %}"
)
PICTURES = [
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30 + 9 * seed, 44, 3), dtype=np.uint8))
    for seed in range(2)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = ["how many red circles? two where"] * 30
    return train_tokenizer(words, 300, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")


def saved(cfg: VLMConfig, tokenizer: Tokenizer, folder: Path, **settings: Any) -> Path:
    """A model of this project with weights large enough that everything counts."""
    cfg = replace(cfg, decoder=replace(cfg.decoder, vocab_size=tokenizer.vocab_size))
    model, generator = VLM(cfg), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    pixels = settings.pop("pixels", Square(28))
    own.save(model, tokenizer, own.ProcessorConfig(pixels, codec=None, max_length=128, **settings), folder)
    return folder


def compare(folder: Path, ours: Any, processor: Any, talk: Any = None) -> None:
    """Loaded without a network or a processor class of ours: nothing missing, scores within 1e-5, tokens equal."""
    theirs, told = hf.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    theirs = theirs.float().eval()
    pictures = [Image(picture) for picture in PICTURES]
    example = processor(ask("how many red circles?", *pictures) if talk is None else talk)
    ids = torch.where(example.medium == 1, theirs.config.image_token_id, example.ids)[None]
    inputs = {"input_ids": ids, "pixel_values": torch.stack(example.pixels)}
    with torch.no_grad():
        wanted = theirs(**inputs).logits
        greedy = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
    slot = -200 if ours.family == "llava_llama" else processor.image_id
    places = torch.where(example.medium == 1, slot, example.ids)[None]
    found = ours.logits(**{**inputs, "input_ids": places})
    torch.testing.assert_close(found, wanted[..., : found.shape[-1]], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.generate_ids(12, **{**inputs, "input_ids": places}), greedy)


def asked(folder: Path, words: str) -> Any:
    """Ids of two pictures and a question as transformers' own processor writes them."""
    processor = hf.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": words}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=text, images=PICTURES, return_tensors="pt", add_special_tokens=False)


@pytest.mark.parametrize("name", DESIGNS)
def test_our_models_load_in_transformers(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = saved(DESIGNS[name], tokenizer, tmp_path / "ours")
    told = convert(folder, tmp_path / "theirs")
    assert told.startswith(f"{tmp_path / 'theirs'}: LlavaForConditionalGeneration of ")
    compare(tmp_path / "theirs", *own.load(folder))


@pytest.mark.parametrize(
    ("cfg", "settings"),
    [
        (DESIGNS["of the default decoder"], {}),
        (DESIGNS["of CLIP and LLaMA"], {"pixels": CenterCrop(28, 28)}),
        (DESIGNS["of two layers and the class token"], {"pixels": PadSquare(28)}),
    ],
)
def test_the_processor_loads_in_transformers(
    cfg: VLMConfig, settings: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The same ids for the same question, and pixels within a level or two of 255."""
    folder = saved(cfg, tokenizer, tmp_path / "ours", **settings)
    convert(folder, tmp_path / "theirs")
    _, processor = own.load(folder)
    example, seen = (
        processor(ask("how many red circles?", *map(Image, PICTURES))),
        asked(tmp_path / "theirs", "how many red circles?"),
    )
    assert seen["input_ids"][0].tolist() == example.ids.tolist()
    assert float((seen["pixel_values"] - torch.stack(example.pixels)).abs().max()) < 0.05
    again = hf.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for text in ("how many?", " two", "where are\n red <circles>?", "Ω ü"):
        assert again(text, add_special_tokens=False)["input_ids"] == processor.tokenizer.encode(text)
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert hf.GenerationConfig.from_pretrained(tmp_path / "theirs").eos_token_id == 2


def test_a_whole_conversation_has_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = saved(DESIGNS["of the default decoder"], tokenizer, tmp_path / "ours")
    convert(folder, tmp_path / "theirs")
    _, processor = own.load(folder)
    picture = Image(PICTURES[0])
    talk = (
        Message("system", (Text("count well"),)),
        *ask("how many?", picture, answer="two"),
        Message("user", (Text("where?"),)),
    )
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    messages = [{"role": "system", "content": "count well"}]
    messages += [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]}]
    messages += [{"role": "assistant", "content": "two"}, {"role": "user", "content": "where?"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).replace(
        "<image>", "<image>" * 16
    )
    assert theirs(text, add_special_tokens=False)["input_ids"] == processor(talk).ids.tolist()


def test_and_are_read_here_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = saved(DESIGNS["of the default decoder"], tokenizer, tmp_path / "ours")
    convert(folder, tmp_path / "theirs")
    first, again = sightline.load(folder), sightline.load(tmp_path / "theirs")
    talk = ask("how many red circles?", Image(PICTURES[0]))
    a, b = first.engine.processor(talk), again.engine.processor(talk)
    assert a.ids.tolist() == b.ids.tolist()
    assert float((a.pixels[0] - b.pixels[0]).abs().max()) < 0.05
    assert first.chat(talk, max_new_tokens=8).text == again.chat(talk, max_new_tokens=8).text


# ------------------------------------------------------------------------------------------------- published by others


def original_folder(folder: Path, linear: bool = False) -> Path:
    """LLaVA by its original names, its tower beside it, with a tokenizer that has no token for pictures."""
    theirs = llava(projector_hidden_act="linear") if linear else llava()
    names = original(theirs)
    if linear:
        with torch.no_grad():
            names["model.mm_projector.2.weight"].copy_(torch.eye(32))
        names = {k.replace("mm_projector.0.", "mm_projector."): v for k, v in names.items() if "projector.2" not in k}
    inside = "model.vision_tower.vision_tower."
    tower = {k.removeprefix(inside): v for k, v in names.items() if k.startswith(inside)}
    rest = {k: v for k, v in names.items() if not k.startswith(inside)}
    kind = "linear" if linear else "mlp2x_gelu"
    config = {**theirs.config.text_config.to_dict(), "model_type": "llava_llama", "mm_projector_type": kind}
    write(folder / "tower", hf.CLIPVisionConfig(**VISION).to_dict(), tower)
    return write(folder, config | {"mm_vision_tower": "tower"}, rest)


@pytest.fixture
def words() -> Tokenizer:
    """99 words at most, as many as the tiny models have."""
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, **PLAIN}
            for i, name in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {w: i for i, w in enumerate(("<unk>", "<s>", "</s>", *(f"w{i}" for i in range(96))))},
            "unk_token": "<unk>",
        },
    }  # fmt: skip
    return Tokenizer(spec, bos="<s>", eos="</s>", unk="<unk>")


@pytest.mark.parametrize("linear", [False, True])
def test_original_names_become_published_ones(linear: bool, words: Tokenizer, tmp_path: Path) -> None:
    folder = original_folder(tmp_path / "original", linear)
    words.save(folder)
    ours = load_published(folder)
    processor = load_processor(ours)
    convert(folder, tmp_path / "hf", "llava")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (99, 100)
    compare(tmp_path / "hf", ours, processor)
    again = load_processor(load_published(tmp_path / "hf"))
    talk = ask("w3 w4?", Image(PICTURES[0]))
    first, second = processor(talk), again(talk)
    assert torch.equal(torch.where(first.medium == 1, 99, first.ids), second.ids)
    torch.testing.assert_close(torch.stack(first.pixels), torch.stack(second.pixels))


@pytest.mark.parametrize("layout", ["original", "published"])
def test_published_models_become_ours(layout: str, words: Tokenizer, tmp_path: Path) -> None:
    """The same model and the same conversation, from one folder of ours; and back into the published layout."""
    folder = tmp_path / "theirs"
    if layout == "original":
        original_folder(folder)
        tokenizer = words
    else:
        theirs = llava()
        write(folder, theirs.config.to_dict(), layout_1(theirs))
        spec = {**words.spec, "added_tokens": [*words.spec["added_tokens"], {"id": 98, "content": "<image>", **PLAIN}]}
        spec["model"] = {**spec["model"], "vocab": {k: v for k, v in spec["model"]["vocab"].items() if v < 98}}
        tokenizer = Tokenizer(spec, bos="<s>", eos="</s>", unk="<unk>")
        (folder / "chat_template.jinja").write_text(JINJA)
        sizes = {"size": 40, "crop_size": 28, "image_mean": [0.1, 0.2, 0.3]}
        (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    tokenizer.save(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    told = convert(folder, tmp_path / "ours")
    assert told.endswith("model in this project's layout, float32")
    before, after = sightline.load(folder), sightline.load(tmp_path / "ours")
    assert before.published.ends() == after.published.ends() == [7]
    shutil.rmtree(folder)  # ours is complete in itself
    talk = ask("w3 w4", Image(PICTURES[0]))
    first, second = before.engine.processor(talk), after.engine.processor(talk)
    assert first.ids.tolist() == second.ids.tolist()
    assert all(torch.equal(a, b) for a, b in zip(first.pixels, second.pixels, strict=True))
    inputs = {"input_ids": torch.where(first.medium == 1, -200 if layout == "original" else 98, first.ids)[None]}
    inputs["pixel_values"] = torch.stack(first.pixels)
    assert torch.equal(before.logits(**inputs), after.logits(**inputs))
    assert before.chat(talk, max_new_tokens=6).text == after.chat(talk, max_new_tokens=6).text
    convert(tmp_path / "ours", tmp_path / "back", "llava")
    compare(tmp_path / "back", after.published, after.engine.processor, talk)


def test_qwen3_alone_is_read(tmp_path: Path) -> None:
    """The language class that our decoders with norms of queries and keys become."""
    from published_folders import randomised

    theirs = randomised(hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**TEXT, "head_dim": 16})))
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(
            load_published(tmp_path).logits(input_ids=ids), theirs(ids).logits, atol=1e-5, rtol=0
        )
