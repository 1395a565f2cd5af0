"""Pictures of fifty odd sizes and the words around them, for every family that answers questions, against transformers.

Each of our processors is read from a folder, whose `preprocessor_config.json` transformers itself wrote.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf
from picture_files import FILES
from published_folders import VISION
from torch import Tensor
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.aria.processing_aria import AriaProcessor
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llama4.processing_llama4 import Llama4Processor, chat_template as llama4_program
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import sightline
from sightline.core.geometry import Box, Frame, Transform
from sightline.core.patches import patchify, patchify_film
from sightline.core.sequence import Image, Message, Region, Text, Video, ask
from sightline.data.chat_template import ChatTemplate
from sightline.data.images import Seen
from sightline.data.media import open_image
from sightline.data.processor import Processor
from sightline.data.template import Slot
from sightline.language.tokenizer import train_tokenizer
from sightline.zoo import (
    aria as aria_family,
    chameleon as chameleon_family,
    fuyu as fuyu_family,
    internvl as internvl_family,
    mllama as mllama_family,
    qwen2_vl as qwen2_vl_family,
)
from sightline.zoo.checkpoint import write
from sightline.zoo.families import FAMILIES
from sightline.zoo.processors import load_pipeline

QUESTION = "how many red circles are there?"
LEVEL = 1 / 255
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = tuple(f"<patch_index_{i:04d}>" for i in range(1024))
TAGS = ("</doc>", "<image>", "</image>", "</chunk>", "</line>", "<phrase>", "</phrase>", "<object>", "</object>")
TAGS += ("</delimiter_of_multi_objects/>", "<grounding>")
FAKE = "<fake_token_around_image>"
CHAT = ("<|im_start|>", "<|im_end|>")
INTERNVL_CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{{'<|im_end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n' }}{% endif %}"
)


Theirs = Callable[[list[PIL.Image.Image]], tuple[list[int], Sequence[Tensor] | Tensor]]


@dataclass
class Case:
    """A family: its configuration, its control tokens, how transformers prepares a question about pictures."""

    config: dict[str, Any]
    controls: tuple[str, ...]
    theirs: Callable[[Any], tuple[Any, Theirs]]
    named: dict[str, str]
    chat: str = ""


def text_and_images(processor: Any, prompt: Callable[[int], str]) -> Theirs:
    """Most processors take one text and a list of pictures."""

    def call(pictures: list[PIL.Image.Image]) -> tuple[list[int], Tensor]:
        out = processor(images=pictures, text=prompt(len(pictures)), return_tensors="pt")
        return out["input_ids"][0].tolist(), out["pixel_values"]

    return call


def clip(size: int = 28) -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def llava(tokenizer: Any) -> tuple[Any, Theirs]:
    settings = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    images = clip()
    processor = hf.LlavaProcessor(images, tokenizer, **settings)
    return images, text_and_images(processor, lambda n: "<s>USER: " + "<image>\n" * n + QUESTION + " ASSISTANT:")


def llava_next(tokenizer: Any) -> tuple[Any, Theirs]:
    settings = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    side = {"height": 28, "width": 28}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=side, image_grid_pinpoints=pinpoints)
    processor = hf.LlavaNextProcessor(images, tokenizer, **settings)
    prompt = text_and_images(processor, lambda n: "<s>[INST] " + "<image>\n" * n + QUESTION + " [/INST]")

    def call(pictures: list[PIL.Image.Image]) -> tuple[list[int], Tensor]:
        """Without the views that only fill a picture up to the one with most."""
        ids, pixels = prompt(pictures)
        return ids, torch.cat([views[: int((views.flatten(1).abs().sum(1) > 0).sum())] for views in pixels])

    return images, call


def paligemma(tokenizer: Any) -> tuple[Any, Theirs]:
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, tokenizer)
    return images, text_and_images(processor, lambda n: "<image>" * n + QUESTION)


def idefics(tokenizer: Any) -> tuple[Any, Theirs]:
    images = IdeficsImageProcessorPil(image_size=28)
    processor = hf.IdeficsProcessor(images, tokenizer)

    def call(pictures: list[PIL.Image.Image]) -> tuple[list[int], Tensor]:
        prompt = ["User:", *pictures, f"{QUESTION}<end_of_utterance>\nAssistant:"]
        out = processor(text=prompt, return_tensors="pt", add_end_of_utterance_token=False)
        return out["input_ids"][0].tolist(), out["pixel_values"][0]

    return images, call


# InternVL's and Llama 4's processors as a whole need torchvision, which is not there; what they write does not
TAGGED = SimpleNamespace(start_image_token="<img>", image_token="<IMG_CONTEXT>", end_image_token="</img>")
TAGGED.image_seq_length = 4


def internvl(tokenizer: Any) -> tuple[Any, Theirs]:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    size = {"height": 28, "width": 28}
    images = GotOcr2ImageProcessorPil(size=size, max_patches=12, image_mean=mean, image_std=std)

    def call(pictures: list[PIL.Image.Image]) -> tuple[list[int], Tensor]:
        found = images(pictures, crop_to_patches=True, return_tensors="pt")
        shown = [InternVLProcessor.replace_image_token(TAGGED, found, i) + "\n" for i in range(len(pictures))]
        prompt = f"<|im_start|>user\n{''.join(shown)}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        return tokenizer(prompt)["input_ids"], found["pixel_values"]

    return images, call


def kosmos2(tokenizer: Any) -> tuple[Any, Theirs]:
    square = {"height": 28, "width": 28}  # which `use_square_size` of the published file means, of 224
    images = CLIPImageProcessorPil(size=square, crop_size=square)
    processor = hf.Kosmos2Processor(images, tokenizer)

    def call(pictures: list[PIL.Image.Image]) -> tuple[list[int], Tensor]:
        out = processor(images=pictures[0], text=f"<grounding> {QUESTION}", return_tensors="pt", num_image_tokens=3)
        ids, mask = out["input_ids"][0], out["image_embeds_position_mask"][0].bool()
        return ids.masked_fill(mask, tokenizer.convert_tokens_to_ids("<image>")).tolist(), out["pixel_values"]

    return images, call


def aria(tokenizer: Any) -> tuple[Any, Theirs]:
    images = AriaImageProcessorPil(max_image_size=490, min_image_size=168)
    processor = AriaProcessor(images, tokenizer, size_conversion={490: 5, 980: 7})
    slot = "<fim_prefix><|img|><fim_suffix>"

    def call(pictures: list[PIL.Image.Image]) -> tuple[list[int], Tensor]:
        prompt = f"<|im_start|>user\n{slot * len(pictures)}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        out = processor(images=pictures, text=prompt, return_tensors="pt", max_image_size=490, min_image_size=168)
        return out["input_ids"][0].tolist(), out["pixel_values"]

    return images, call


def chameleon(tokenizer: Any) -> tuple[Any, Theirs]:
    images = ChameleonImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tokenizer.sep_token = "<reserved08706>"
    processor = hf.ChameleonProcessor(images, tokenizer, image_seq_length=49)
    return images, text_and_images(processor, lambda n: "<s>" + "<image>" * n + QUESTION)


def mllama(tokenizer: Any) -> tuple[Any, Theirs]:
    images = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    processor = hf.MllamaProcessor(images, tokenizer)

    def call(pictures: list[PIL.Image.Image]) -> tuple[list[int], list[Tensor]]:
        """With each picture's tiles put together to the canvas that they were cut from."""
        said = f"{'<|image|>' * len(pictures)}{QUESTION}<|eot_id|>{header('assistant')}"
        out = processor(images=[pictures], text=f"<|begin_of_text|>{header('user')}{said}", return_tensors="pt")
        canvases = []
        for tiles, number in zip(out["pixel_values"][0], out["aspect_ratio_ids"][0].tolist(), strict=True):
            rows, columns = mllama_family.SHAPES[number - 1]
            laid = tiles[: rows * columns].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
            canvases.append(laid.flatten(3, 4).flatten(1, 2))
        return out["input_ids"][0].tolist(), canvases

    return images, call


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


CLIP_VISION = {"model_type": "clip_vision_model", **VISION}
LLAMA = {"model_type": "llama", **TEXT}
PAIR = {"vision_config": CLIP_VISION, "text_config": LLAMA}
KOSMOS = {"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4, "max_position_embeddings": 256}
ARIA_TEXT = {**TEXT, "model_type": "aria_text", "moe_num_experts": 3, "moe_topk": 2, "moe_num_shared_experts": 1}
CODES = {"embed_dim": 6, "num_embeddings": 9, "base_channels": 32, "channel_multiplier": [1, 1, 1], "resolution": 28}
CODES |= {"latent_channels": 8, "num_res_blocks": 1}
CODED = {f"IMGIMG{str(code).translate(chameleon_family.SPELLED)}Z": 270 + code for code in range(9)}
CASES = {
    "llava": Case(PAIR, ("<s>", "</s>", "<image>"), llava, {"bos": "<s>", "eos": "</s>"}),
    "llava_next": Case(
        {**PAIR, "text_config": {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2}},
        ("<s>", "</s>", "<image>"),
        llava_next,
        {"bos": "<s>", "eos": "</s>"},
    ),
    "paligemma": Case(
        {**PAIR, "vision_config": {**VISION, "model_type": "siglip_vision_model"}}
        | {"text_config": {**LLAMA, "model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1}},
        ("<pad>", "<bos>", "<eos>", "<image>"),
        paligemma,
        {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
    ),
    "idefics": Case(
        {"vision_config": VISION, **TEXT, "additional_vocab_size": 3},
        ("<unk>", "<s>", "</s>", "<image>", FAKE, "<end_of_utterance>"),
        idefics,
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<unk>"},
    ),
    "internvl": Case(
        {"vision_config": VISION, "text_config": {**LLAMA, "model_type": "qwen2"}},
        (*CHAT, "<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<ref>", "</ref>"),
        internvl,
        {"eos": "<|im_end|>"},
        INTERNVL_CHAT,
    ),
    "kosmos-2": Case(
        {"latent_query_num": 3, "vision_config": VISION, "text_config": KOSMOS},
        ("<s>", "<pad>", "</s>", "<unk>", *TAGS, *PATCHES),
        kosmos2,
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
    ),
    "aria": Case(
        {"vision_config": {**VISION, "image_size": 490, "patch_size": 14}, "text_config": ARIA_TEXT}
        | {"projector_patch_to_query_dict": {"1225": 5, "4900": 7}},
        (*CHAT, "<|img|>", "<fim_prefix>", "<fim_suffix>", "<unk>"),
        aria,
        {"eos": "<|im_end|>", "unk": "<unk>", "pad": "<unk>"},
    ),
    "chameleon": Case(
        {**TEXT, "num_key_value_heads": 4, "vq_config": CODES, "vocabulary_map": {"<image>": 0, **CODED}},
        ("<unk>", "<s>", "</s>", "<image>", "<racm3:break>", "<eoss>", "<reserved08706>"),
        chameleon,
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    ),
    "mllama": Case(
        {
            "vision_config": {**VISION, "num_global_layers": 1, "intermediate_layers_indices": [0, 1]},
            "text_config": {**TEXT, "num_hidden_layers": 6, "cross_attention_layers": [1, 4], "num_key_value_heads": 2},
        },
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>"),
        mllama,
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
    ),
}


def folder_of(name: str, case: Case, folder: Path) -> Path:
    """A random checkpoint in the family's published layout, with a tokenizer."""
    words = [f"{QUESTION} USER: ASSISTANT: [INST] [/INST] user assistant Frame1: Frame2:"] * 30
    tokenizer = train_tokenizer(words, 300 + len(case.controls), case.controls, **case.named)
    size = tokenizer.vocab_size
    c = {"model_type": name, **case.config, "vocab_size": size, "image_token_index": size - 1}
    if "text_config" in c:
        c["text_config"] = {**c["text_config"], "vocab_size": size}
    family = FAMILIES[name]
    model = family.build(c, folder)
    write(folder, family.keys(model.config).save(model.state_dict()), c)
    for token in tokenizer.spec["added_tokens"] if name == "kosmos-2" else []:
        token["lstrip"] = token["content"] in (*TAGS, *PATCHES)  # they take the space before them
    tokenizer.save(folder)
    if case.chat:
        (folder / "chat_template.jinja").write_text(case.chat)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Processor, Theirs]]:
    """pairs(family): our processor of a folder, and theirs."""
    made: dict[str, tuple[Processor, Theirs]] = {}

    def get(name: str) -> tuple[Processor, Theirs]:
        if name not in made:
            case = CASES[name]
            folder = folder_of(name, case, tmp_path_factory.mktemp("processors") / name)
            named = {f"{key}_token": value for key, value in case.named.items()}
            extra = {"image_token": "<|img|>"} if name == "aria" else {"image_token": "<image>"}
            tokenizer = hf.PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer.json"),
                **named,
                **({"extra_special_tokens": extra} if name in ("aria", "paligemma") else {}),
            )
            images, theirs = case.theirs(tokenizer)
            images.save_pretrained(folder)
            made[name] = sightline.load(folder).engine.processor, theirs
        return made[name]

    return get


def check(ours: Processor, theirs: Theirs, chosen: list[bytes]) -> None:
    """Ids equal, pixels within one level of 255; padding below and right of what we see is not looked at."""
    pictures = [open_image(data) for data in chosen]
    example = ours(ask(QUESTION, *pictures))
    ids, pixels = theirs([PIL.Image.open(io.BytesIO(data)) for data in chosen])
    assert example.ids.tolist() == ids
    assert len(example.pixels) == len(pixels)
    level = LEVEL / min(ours.pixels.scaling.std)
    for found, wanted in zip(example.pixels, pixels, strict=True):
        _, height, width = found.shape
        torch.testing.assert_close(found, wanted[:, :height, :width].float(), atol=level, rtol=0.0)


@pytest.mark.parametrize("name", CASES)
def test_fifty_pictures(pairs: Callable[[str], tuple[Processor, Theirs]], name: str) -> None:
    ours, theirs = pairs(name)
    for data in FILES:
        check(ours, theirs, [data])


@pytest.mark.parametrize("name", [name for name in CASES if name != "kosmos-2"])  # which takes one
def test_several_pictures(pairs: Callable[[str], tuple[Processor, Theirs]], name: str) -> None:
    ours, theirs = pairs(name)
    for chosen in (FILES[3:5], FILES[4:10:2]):
        check(ours, theirs, chosen)


def test_qwen2_vl_of_any_size(tmp_path: Path) -> None:
    """Its processor as a whole needs torchvision; what it writes is compared in `test_qwen2_vl`."""
    theirs = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 84, patch_size=7)
    theirs.save_pretrained(tmp_path)
    ours = load_pipeline(tmp_path, FAMILIES["qwen2_vl"].habits, 448)  # type: ignore[arg-type]
    shapes = set()
    for data in FILES:
        wanted = theirs(PIL.Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")
        (pixels,) = ours.seen(open_image(data).picture).pixels
        found = patchify_film(pixels, 7)
        shapes.add(found.grids[0])
        assert [found.grids[0]] == [tuple(grid) for grid in wanted["image_grid_thw"].tolist()]
        patches = qwen2_vl_family.row_major(wanted["pixel_values"], found.grids[0], 2)
        torch.testing.assert_close(found.values, patches, atol=LEVEL / 0.26, rtol=0.0)
    assert len(shapes) > 10


def test_fuyu_of_any_size(tmp_path: Path) -> None:
    """Its processor as a whole cuts tensors as if they were arrays, and fails; `test_fuyu` compares words."""
    theirs = FuyuImageProcessorPil(size={"height": 90, "width": 60}, patch_size={"height": 30, "width": 30})
    theirs.save_pretrained(tmp_path)
    ours = load_pipeline(tmp_path, FAMILIES["fuyu"].habits, 300)  # type: ignore[arg-type]
    for data in FILES:
        made = theirs(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
        (pixels,) = ours.seen(open_image(data).picture).pixels
        whole = np.asarray(made["images"][0][0])[:, : pixels.shape[1], : pixels.shape[2]]
        wanted = fuyu_family.channels_first(torch.as_tensor(theirs.patchify_image(whole)), 3, 30)
        torch.testing.assert_close(patchify(pixels[None], 30).values, wanted, atol=2 * LEVEL + 1e-5, rtol=0.0)


@pytest.mark.parametrize("most", [490, 980])
def test_aria_in_pieces(tmp_path: Path, most: int) -> None:
    """A picture is first fitted to a canvas of several squares."""
    theirs = AriaImageProcessorPil(max_image_size=most, split_image=True)
    theirs.save_pretrained(tmp_path)
    config = {"vision_config": {"patch_size": 14}}
    ours = load_pipeline(tmp_path, aria_family.habits(config), 980)
    shapes = set()
    for size in ((500, 900), (1500, 480), (700, 2000), (600, 600), (2000, 990)):
        picture = open_image(FILES[8]).picture.resize(size)
        found = ours.seen(picture)
        wanted = theirs(picture, return_tensors="pt")
        assert len(found.pixels) == wanted["num_crops"] == len(wanted["pixel_values"])
        assert found.tiles[0] * found.tiles[1] == len(found.pixels)
        shapes.add(found.tiles)
        for pixels, pixel, mask in zip(found.pixels, wanted["pixel_values"], wanted["pixel_mask"], strict=True):
            _, height, width = pixels.shape
            assert height - 14 < int(mask[:, 0].sum()) <= height and width - 14 < int(mask[0].sum()) <= width
            torch.testing.assert_close(pixels, pixel[:, :height, :width].float(), atol=2 * LEVEL, rtol=0.0)
    assert len(shapes) > 2


@pytest.mark.parametrize("most", [1, 2, 6, 40])
def test_internvl_of_any_number_of_tiles(tmp_path: Path, most: int) -> None:
    theirs = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, min_patches=1, max_patches=most)
    theirs.save_pretrained(tmp_path)
    transformers_s = load_pipeline(tmp_path, FAMILIES["internvl"].habits, 448)  # type: ignore[arg-type]
    settings = {"dynamic_image_size": True, "max_dynamic_patch": most, "use_thumbnail": True, "force_image_size": 28}
    original = internvl_family.original_habits({"llm_config": {"model_type": "internlm2"}, **settings})
    counts = set()
    for data in FILES[::3]:
        wanted = theirs(PIL.Image.open(io.BytesIO(data)), crop_to_patches=True, return_tensors="pt")["pixel_values"]
        counts.add(len(wanted))
        for ours in (transformers_s, load_pipeline(tmp_path, original, 448)):
            found = torch.stack(ours.seen(open_image(data).picture).pixels)
            torch.testing.assert_close(found, wanted, atol=LEVEL / 0.26, rtol=0.0)
    assert max(counts) > most / 2


def film(*numbers: int) -> Video:
    return Video(tuple(open_image(FILES[number]) for number in numbers), tuple(map(float, numbers)))


def test_internvl_of_a_film(pairs: Callable[[str], tuple[Processor, Theirs]]) -> None:
    """A film's frames are numbered and of one tile each, also where the same picture is seen in tiles beside it."""
    ours, _ = pairs("internvl")
    talk = (Message("user", (open_image(FILES[6]), film(6, 7), Text(QUESTION))),)
    example = ours(talk)
    whole = ours(ask(QUESTION, open_image(FILES[6])))
    tiles = len(whole.pixels)
    assert tiles > 1 and len(example.pixels) == tiles + 2
    assert torch.equal(example.pixels[tiles], whole.pixels[-1])  # the thumbnail and the frame
    frames = {"pixel_values_videos": torch.stack(example.pixels[tiles:])[None]}
    shown = InternVLProcessor.replace_video_token(TAGGED, frames, 0)
    first = InternVLProcessor.replace_image_token(TAGGED, {"num_patches": [tiles]}, 0)
    wanted = f"<|im_start|>user\n{first}\n{shown}\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert ours.tokenizer.decode(example.ids.tolist(), skip_control=False) == wanted
    assert example.ids.tolist() == ours.tokenizer.trusted(wanted)


def test_kosmos2_of_phrases(pairs: Callable[[str], tuple[Processor, Theirs]], tmp_path: Path) -> None:
    ours, _ = pairs("kosmos-2")
    case = CASES["kosmos-2"]
    ours.tokenizer.save(tmp_path)
    named = {f"{key}_token": value for key, value in case.named.items()}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **named)
    processor = hf.Kosmos2Processor(clip(), tokenizer)
    frame = Frame(90, 60)
    boxes = [Box(9, 6, 45, 30, frame, "red circles"), Box(50, 1, 90, 59, frame, "red circles")]
    picture = PIL.Image.new("RGB", (90, 60), "red")
    talk = (Message("user", (Image(picture), *(Region(box) for box in boxes), Text(" are there?"))),)
    found = ours(talk)
    shares = [tuple(x / side for x, side in zip(box.xyxy, (90, 60, 90, 60), strict=True)) for box in boxes]
    out = processor(
        images=picture,
        text="<grounding><phrase> red circles</phrase> are there?",
        bboxes=[shares],
        num_image_tokens=3,
        return_tensors="pt",
    )
    places = out["image_embeds_position_mask"][0].bool()
    assert places.nonzero()[:, 0].tolist() == found.slots.tolist()
    assert found.ids[~places].tolist() == out["input_ids"][0][~places].tolist()


def test_kosmos2_is_asked_to_find(pairs: Callable[[str], tuple[Processor, Theirs]], tmp_path: Path) -> None:
    """The published form of a phrase whose places are to follow."""
    ours, _ = pairs("kosmos-2")
    ours.tokenizer.save(tmp_path)
    named = {f"{key}_token": value for key, value in CASES["kosmos-2"].named.items()}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **named)
    processor, picture = hf.Kosmos2Processor(clip(), tokenizer), open_image(FILES[5])
    text = "<grounding><phrase> red circles</phrase>"
    wanted = processor(images=picture.picture, text=text, num_image_tokens=3, return_tensors="pt")
    places = wanted["image_embeds_position_mask"][0].bool()
    assert ours.codec is not None
    found = ours((Message("user", ours.codec.find("red circles", picture)),))
    assert found.ids[~places].tolist() == wanted["input_ids"][0][~places].tolist()


def test_internvl_is_asked_to_find(pairs: Callable[[str], tuple[Processor, Theirs]]) -> None:
    """Within the folder's own template: the tags are control tokens, those that a phrase spells are not."""
    ours, _ = pairs("internvl")
    assert ours.codec is not None
    for phrase in ("red circles", "</ref><|im_end|>"):
        found = ours((Message("user", ours.codec.find(phrase, open_image(FILES[5]))),))
        said = ours.tokenizer.decode(found.ids.tolist(), skip_control=False)
        asked = "Please provide the bounding box coordinate of the region this sentence describes: "
        assert said.endswith(f"</img>\n{asked}<ref>{phrase}</ref><|im_end|>\n<|im_start|>assistant\n")
        ids = [ours.tokenizer.control(name) for name in ("<ref>", "</ref>", "<|im_end|>")]
        assert [index for index in found.ids.tolist() if index in ids] == ids


def test_llama4_separates_tiles() -> None:
    """Its canvases are compared in tests/golden."""
    separated = FAMILIES["llama4"].habits.expand  # type: ignore[union-attr]
    for rows, columns in ((1, 1), (1, 2), (3, 1), (2, 3), (4, 4)):
        count = rows * columns + (rows * columns > 1)
        seen = Seen((torch.zeros(3, 1, 1),) * count, Transform(Frame(1, 1)), (rows, columns))
        found = "".join(part if isinstance(part, str) else "<|patch|>" * part for part in separated(seen, [4] * count))
        assert found == Llama4Processor._prompt_split_image(None, (rows, columns), 4)


def test_llama4_s_form_of_conversation() -> None:
    """Ours for folders without a template against the published program."""
    habits = FAMILIES["llama4"].habits
    names = ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|image|>")
    published = ChatTemplate(llama4_program, names, "<|image|>", names[0], "<|eot|>")
    picture = Image(PIL.Image.new("RGB", (8, 8)))
    first = Message("user", (picture, Text("how many?"), picture))
    system, answer = Message("system", (Text("be short"),)), Message("assistant", (Text("two"),))
    for talk in ((first,), (system, first), (first, answer), (system, first, answer, *ask("where?", picture))):
        both = [template(talk) for template in (habits.template, published)]  # type: ignore[union-attr]
        ours, theirs = (["#" if isinstance(s, Slot) else getattr(s, "text", "") or s.name for s in x] for x in both)
        assert "".join(ours) == "".join(theirs)
        assert ours.count("#") == theirs.count("#")
