"""Qwen2-VL and Qwen2.5-VL against transformers: pictures of any size, films, words on three axes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import TEXT, in_memory, picture, randomised, saved, write
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import sightline
from sightline.core.errors import ConfigError, InputError
from sightline.core.geometry import Box, Frame
from sightline.core.patches import patchify_film
from sightline.core.sequence import Image, Message, Region, Text, Video
from sightline.data.native_resolution import NativeResolution
from sightline.grounding.codecs import CODECS
from sightline.language.tokenizer import train_tokenizer
from sightline.layers import native
from sightline.zoo import qwen2_vl as family
from sightline.zoo.describe import count
from sightline.zoo.families import ROWS
from sightline.zoo.published import Published, load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
IMAGE, FILM = 90, 91
IDS = {"image_token_id": IMAGE, "video_token_id": FILM, "vision_start_token_id": 92, "vision_end_token_id": 93}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
PATCH = 4
GRIDS = [(1, 4, 6), (1, 2, 2), (1, 10, 6), (1, 6, 4)]
FILMS = [(2, 4, 6), (3, 6, 2)]
KINDS = ("qwen2_vl", "qwen2_5_vl")


def qwen(kind: str, **more: Any) -> Any:
    text = {**TEXT, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    text["rope_parameters"] = ROPE
    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "hidden_size": 32}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
        config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, **IDS, **more)
        return sharpened(hf.Qwen2VLForConditionalGeneration(config))
    # squares of 4x4 patches, so that grids have whole ones and rests on either side
    vision |= {"out_hidden_size": 32, "intermediate_size": 40, "window_size": 16, "fullatt_block_indexes": [1]}
    vision |= {"tokens_per_second": 2}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS, **more)
    return sharpened(hf.Qwen2_5_VLForConditionalGeneration(config))


def sharpened(model: Any) -> Any:
    """Random weights whose attention is far from even, so that places matter."""
    randomised(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("qkv.weight", "q_proj.weight", "k_proj.weight")):
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Published]:
    theirs = qwen(request.param)
    return theirs, load_published(saved(theirs, tmp_path_factory.mktemp(request.param)))


def inputs(*items: tuple[int, int, int], seed: int = 2, **more: Any) -> dict[str, Tensor]:
    """A row of words around pictures of one step of time and films of several."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 80, (12,), generator=torch.Generator().manual_seed(1))
    parts = [words[:2]]
    for t, h, w in items:
        token = IMAGE if t == 1 else FILM
        parts += [torch.tensor([92]), torch.full((t * h * w // 4,), token), torch.tensor([93]), words[2:4]]
    ids = torch.cat([*parts, words[4:]])[None]
    given = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == FILM).long()}
    for names, chosen in (
        (("pixel_values", "image_grid_thw"), [item for item in items if item[0] == 1]),
        (("pixel_values_videos", "video_grid_thw"), [item for item in items if item[0] > 1]),
    ):
        if chosen:
            total = sum(t * h * w for t, h, w in chosen)
            given[names[0]] = torch.randn(total, 3 * 2 * PATCH * PATCH, generator=generator)
            given[names[1]] = torch.tensor(chosen)
    return given | more


def logits(model: Any, **given: Any) -> Tensor:
    model.model.rope_deltas = None
    with torch.no_grad():
        return model(**given).logits


def greedy(model: Any, **given: Any) -> Tensor:
    model.model.rope_deltas = None
    with torch.no_grad():
        written = model.generate(**given, max_new_tokens=32, do_sample=False)
    return written[:, given["input_ids"].shape[1] :]


def compare(theirs: Any, ours: Published, given: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours.logits(**given), logits(theirs, **given), **TOLERANCE)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy(theirs, **given))


@pytest.mark.parametrize(
    "items", [(), GRIDS[:1], GRIDS, FILMS[:1], (FILMS[1], GRIDS[2], FILMS[0], GRIDS[0])], ids=lambda items: len(items)
)
def test_pictures_and_films_of_any_size(pair: tuple[Any, Published], items: tuple[tuple[int, int, int], ...]) -> None:
    theirs, ours = pair
    given = inputs(*items)
    if ours.family == "qwen2_5_vl" and "video_grid_thw" in given:  # a place for each step, no more than for its sides
        given["second_per_grid_ts"] = torch.full((len(given["video_grid_thw"]),), 0.5)
    compare(theirs, ours, given)
    for name in ("pixel_values", "pixel_values_videos"):  # what is shown is seen
        if name in given:
            other = given | {name: given[name].flip(0)}
            assert (ours.logits(**other) - ours.logits(**given)).abs().max() > 0.01


def test_time_in_seconds(tmp_path: Path) -> None:
    """Places on the axis of time are whole steps of two a second; the published code adds up sides, not times."""
    theirs = qwen("qwen2_5_vl")
    ours = load_published(saved(theirs, tmp_path))
    films = ((2, 4, 8), (2, 12, 4))
    given = inputs(*films, second_per_grid_ts=torch.tensor([0.75, 2.0]))
    compare(theirs, ours, given)
    places = ours.batch(**given).layout.position[0]
    assert places[3:19, 0].tolist() == [3] * 8 + [4] * 8  # 1.5 cut to 1
    assert (places[:, 0] - places[:, 1]).max() == 4
    other = given | {"second_per_grid_ts": torch.tensor([0.75, 1.0])}
    assert (ours.logits(**other) - ours.logits(**given)).abs().max() > 1e-3


def test_what_follows_a_film_goes_on_after_all_of_it(tmp_path: Path) -> None:
    """As the weights were trained (arXiv:2409.12191, section 2.1); transformers 5.23 goes on after the longer side."""
    ours = load_published(saved(qwen("qwen2_5_vl"), tmp_path))
    given = inputs((3, 4, 4), second_per_grid_ts=torch.tensor([5.0]))
    places = ours.batch(**given).layout.position[0]
    assert places[3:15, 0].tolist() == [3] * 4 + [13] * 4 + [23] * 4
    assert places[15].tolist() == [24] * 3


@pytest.mark.parametrize("kernels", [True, False])
def test_the_fast_ways_know_the_axes(
    pair: tuple[Any, Published], kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels and native.library() is None:
        pytest.skip("no compiler on this machine")
    monkeypatch.setattr(native, "WORTH", 0 if kernels else 1 << 60)
    theirs, ours = pair
    ours.save(tmp_path)
    again = load_published(tmp_path)
    assert (again.runner.decoder.stepper is not None) == kernels
    compare(theirs, again, inputs(GRIDS[2], GRIDS[0]))


def test_left_padded_batch(pair: tuple[Any, Published]) -> None:
    theirs, ours = pair
    long, short = inputs(GRIDS[2], FILMS[0]), inputs(GRIDS[0], seed=5)
    gap = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    given = {
        name: torch.cat([long[name], torch.cat([torch.zeros(1, gap, dtype=torch.int64), short[name]], dim=1)])
        for name in ("input_ids", "mm_token_type_ids")
    }
    given |= {name: torch.cat([long[name], short[name]]) for name in ("pixel_values", "image_grid_thw")}
    given |= {name: long[name] for name in ("pixel_values_videos", "video_grid_thw")}
    mask = torch.ones_like(given["input_ids"])
    mask[1, :gap] = 0
    given["attention_mask"] = mask
    wanted = logits(theirs, **given)
    torch.testing.assert_close(ours.logits(**given)[mask.bool()], wanted[mask.bool()], **TOLERANCE)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy(theirs, **given))


def test_what_we_save_loads_in_transformers_and_here(pair: tuple[Any, Published], tmp_path: Path) -> None:
    theirs, ours = pair
    ours.save(tmp_path)
    again, told = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    given = inputs(GRIDS[0], FILMS[0])
    assert torch.equal(logits(again.eval(), **given), logits(theirs, **given))
    assert torch.equal(load_published(tmp_path).logits(**given), ours.logits(**given))


def test_layouts_give_the_same_model(pair: tuple[Any, Published], tmp_path: Path) -> None:
    """As transformers 4.52 wrote it, and with the flat configuration of the published folders."""
    theirs, ours = pair
    c = theirs.config.to_dict()
    text = {key: value for key, value in c.pop("text_config").items() if key not in ("rope_parameters", "model_type")}
    flat = {**text, **c, "rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    again = load_published(write(tmp_path, flat, in_memory(theirs)))
    given = inputs(GRIDS[1])
    assert torch.equal(again.logits(**given), ours.logits(**given))


def test_a_head_that_is_the_table(tmp_path: Path) -> None:
    theirs = qwen("qwen2_vl", tie_word_embeddings=True)
    ours = load_published(saved(theirs, tmp_path / "theirs"))
    assert ours.model.config.decoder.tied
    compare(theirs, ours, inputs(GRIDS[0]))


def test_inputs_that_contradict_each_other_are_told(pair: tuple[Any, Published]) -> None:
    ours, given = pair[1], inputs(GRIDS[0])
    with pytest.raises(InputError, match=r"^6 tokens of pixel_values in input_ids, image_grid_thw needs 4$"):
        ours.logits(**given | {"image_grid_thw": torch.tensor([[1, 4, 4]]), "pixel_values": given["pixel_values"][:16]})
    with pytest.raises(InputError, match=r"^6 tokens of pixel_values, expected pixel_values and image_grid_thw for"):
        ours.logits(input_ids=given["input_ids"])
    with pytest.raises(
        InputError, match=r"^pixel_values holds 24 patches, the grids of image_grid_thw another number$"
    ):
        ours.logits(**given | {"image_grid_thw": torch.tensor([[1, 4, 4]])})
    apart = given["input_ids"].clone()
    apart[0, [5, 11]] = apart[0, [11, 5]]
    with pytest.raises(InputError, match=r"^item 1 of pixel_values has its tokens apart, expected 6 in a row$"):
        ours.logits(**given | {"input_ids": apart})
    with pytest.raises(ConfigError, match="a grid of 3x8 patches cannot be folded in squares of 2"):
        ours.logits(**given | {"image_grid_thw": torch.tensor([[1, 3, 8]])})
    with pytest.raises(ConfigError, match="rotary positions of kind 'yarn', expected 'default' or 'mrope'"):
        family.config({"rope_scaling": {"type": "yarn"}})


@pytest.mark.parametrize("name", ["qwen2-vl-2b-instruct", "qwen2-vl-7b-instruct", "qwen2.5-vl-3b-instruct"])
def test_the_published_size(name: str) -> None:
    row = ROWS[name]
    classes = {"Qwen2-VL": (hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration)}
    classes["Qwen2.5-VL"] = (hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration)
    config, model = classes[row.family]
    with torch.device("meta"):
        theirs = model(config(**row.config))
    assert count(row.model) == sum(p.numel() for p in theirs.parameters())


# -------------------------------------------------------------------------------------------------------- processor


@pytest.mark.parametrize("size", [(57, 31), (200, 40), (28, 28), (5, 900), (640, 479), (13, 17)])
def test_pixels_as_the_published_processor(size: tuple[int, int]) -> None:
    bounds = {"min_pixels": 56 * 56, "max_pixels": 300 * 300}
    theirs = Qwen2VLImageProcessorPil(**bounds)(picture(*size), return_tensors="pt")
    ours = family.pixels(bounds, 0).seen(picture(*size))
    patches = patchify_film(ours.pixels[0], 14)
    assert [patches.grids[0]] == [tuple(grid) for grid in theirs["image_grid_thw"].tolist()]
    wanted = family.row_major(theirs["pixel_values"], patches.grids[0], 2)
    assert (patches.values - wanted).abs().max() <= 1 / 255 / 0.26 + 1e-5
    assert ours.way.target.width == patches.grids[0][2] * 14


def test_a_film_is_one_item_whose_last_frame_fills_it_up() -> None:
    pipeline = NativeResolution(multiple=8, area=(64, 1600), film_area=(64, 256))
    frames = [picture(33, 21), picture(33, 21).rotate(180), picture(33, 21)]
    seen = pipeline.film(frames, (0.0, 0.25, 0.5))
    assert seen.pixels[0].shape == (2, 2, 3, 8, 16) and (seen.frames, seen.seconds) == (3, 0.5)
    alone = NativeResolution(multiple=8, area=(64, 256)).seen(frames[2]).pixels[0]
    assert torch.equal(seen.pixels[0][1], alone[0])
    assert pipeline.film(frames[:1], (3.0,)).seconds == 2.0
    for wrong in ([], [picture(9, 9), picture(9, 8)]):
        with pytest.raises(InputError, match="expected some, all of one size"):
            pipeline.film(wrong, (0.0, 1.0))
    with pytest.raises(ConfigError, match="expected rising sizes"):
        NativeResolution(area=(10, 9))


def test_a_ribbon_is_refused() -> None:
    with pytest.raises(InputError, match="2x402 pixels, one side is more than 200 times the other"):
        NativeResolution().seen(picture(2, 402))


CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
CONTROLS += ("<|image_pad|>", "<|video_pad|>")
JINJA = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer, whose image tokens are those of the tokenizer."""
    path = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(["what happens in this film and picture?"] * 30, 400, CONTROLS, eos="<|im_end|>")
    named = {"image_token_id": tokenizer.control("<|image_pad|>"), "video_token_id": tokenizer.control("<|video_pad|>")}
    theirs = qwen(request.param)
    c = theirs.config.to_dict() | named
    c["text_config"] |= {"vocab_size": 400, "max_position_embeddings": 512}
    model = sharpened(type(theirs)(type(theirs.config)(**c)))
    saved(model, path)
    tokenizer.save(path)
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 1600}
    (path / "preprocessor_config.json").write_text(json.dumps(sizes))
    return path


def conversation() -> tuple[Message, ...]:
    film = Video(tuple(Image(picture(20 + n, 20 + n).resize((30, 22))) for n in range(5)), (0.0, 0.5, 1.0, 1.5, 2.0))
    return (Message("user", (Image(picture(33, 21)), Text("what happens in "), film, Text("this film?"))),)


def test_a_conversation_as_the_model_reads_it(folder: Path) -> None:
    """The same ids, patches and places by the conversation and by the published inputs; both templates alike."""
    processor = sightline.load(folder).engine.processor
    example = processor(conversation())
    said = processor.tokenizer.decode(example.ids.tolist(), skip_control=False)
    image, film = "<|image_pad|>" * 12, "<|video_pad|>" * 36
    assert said == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + image
        + "<|vision_end|>what happens in <|vision_start|>" + film
        + "<|vision_end|>this film?<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    theirs = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert theirs(said)["input_ids"] == example.ids.tolist()  # as the published processor has it tokenised, in one go
    (folder / "chat_template.jinja").write_text(JINJA)
    assert torch.equal(sightline.load(folder).engine.processor(conversation()).ids, example.ids)
    (folder / "chat_template.jinja").unlink()

    still, moving = (patchify_film(pixels, PATCH) for pixels in example.pixels)
    assert (still.grids, moving.grids) == (((1, 6, 8),), ((3, 6, 8),))

    def published(patches: Any) -> Tensor:
        """Square by square, as published: the inverse of the order here."""
        places = family.row_major(torch.arange(float(len(patches.values)))[:, None], patches.grids[0], 2)[:, 0].long()
        return torch.empty_like(patches.values).index_copy(0, places, patches.values)

    given = {"pixel_values": published(still), "image_grid_thw": torch.tensor(still.grids)}
    given |= {"pixel_values_videos": published(moving), "video_grid_thw": torch.tensor(moving.grids)}
    ours = load_published(folder)
    if ours.family == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([1.0])  # two frames, half a second apart
    batch = ours.batch(input_ids=example.ids[None], **given)
    assert torch.equal(batch.layout.position[0], example.position)
    assert torch.equal(batch.layout.medium[0], example.medium)
    assert torch.equal(batch.slots, example.slots) and batch.patches.grids == still.grids + moving.grids
    torch.testing.assert_close(batch.patches.values, torch.cat([still.values, moving.values]))


def test_places_name_pictures_by_number_frames_among_them(folder: Path) -> None:
    """A picture, a film of five frames and another picture are numbers 0, 1 to 5 and 6."""
    processor = sightline.load(folder).engine.processor
    processor.codec = CODECS["qwen2.5-vl"]
    frame = Frame(40, 20)
    last = Region(Box(0, 0, 40, 20, frame), 6)
    talk = (*conversation(), Message("assistant", (Text("a"),)))
    talk += (Message("user", (Image(picture(40, 20)), Text("b"))), Message("assistant", (last,)))
    example = processor(talk)
    assert len(example.transforms) == 7 and len(example.pixels) == 3
    assert [way.source.width for way in example.transforms] == [33, *[30] * 5, 40]
    said = processor.tokenizer.decode(example.ids.tolist())
    assert '{"bbox_2d": [0, 0, 40, 16]}' in said
    assert processor.read(example.ids.tolist()[-40:], example.transforms).boxes[0].frame == frame


def test_a_folder_answers_questions_of_either_kind_together(folder: Path) -> None:
    """Rows with pictures of several sizes, with a film and with words alone, answered as each would be alone."""
    model = sightline.load(folder)
    asked = [
        conversation(),
        (Message("user", (Image(picture(50, 20)), Text("what?"))),),
        (Message("user", (Image(picture(50, 20)), Text("this picture?"))),),
        (Message("user", (Text("what?"),)),),
    ]
    sampling = sightline.serving.sampling.Sampling(max_new_tokens=6)
    together = model.engine.answer(asked, sampling)
    assert [reply.error for reply in together] == [None] * 4
    for one, reply in zip(asked, together, strict=True):
        assert model.engine.answer([one], sampling)[0].ids == reply.ids


def test_an_answer_is_what_is_learned() -> None:
    talk = (*conversation(), Message("assistant", (Text("it falls"),)))
    segments = family.template(talk)
    assert next(part for part in segments if getattr(part, "learned", False)).text == "it falls"
    assert sum(type(part).__name__ == "Slot" for part in segments) == 2
    assert type(segments[-2]).__name__ == "End" and segments[-1].text == "\n"
