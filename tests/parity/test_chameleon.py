"""Chameleon against transformers: pictures as words of the decoder's vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import TEXT, picture, pixels, randomised, saved
from torch import Tensor
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

import sightline
from sightline.core.errors import ConfigError, InputError
from sightline.core.patches import join, patchify
from sightline.core.sequence import Image, ask
from sightline.language.tokenizer import train_tokenizer
from sightline.zoo import chameleon as family
from sightline.zoo.describe import count, describe
from sightline.zoo.families import ROWS
from sightline.zoo.published import Published, load_published

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
IMAGE = 4
CODES = 40
SIDE = 16
VQ: dict[str, Any] = {"embed_dim": 6, "num_embeddings": CODES, "base_channels": 32, "channel_multiplier": [1, 2, 2]}
VQ |= {"resolution": SIDE, "latent_channels": 8, "num_res_blocks": 2}
# codes and words in orders of their own
WORDS = {f"IMGIMG{str(code).translate(family.SPELLED)}Z": 50 + (7 * code) % CODES for code in range(CODES)}
SLOTS = (SIDE // 4) ** 2


def chameleon(swin: bool = False, vq: dict[str, Any] | None = None, **more: Any) -> Any:
    sizes = {**TEXT, "swin_norm": swin, "vq_config": {**VQ, **(vq or {})}}
    config = hf.ChameleonConfig(**{**sizes, "vocabulary_map": {"<image>": IMAGE, "a": 5, **WORDS}, **more})
    model = randomised(hf.ChameleonForConditionalGeneration(config))
    with torch.no_grad():  # a codebook of the size of what is looked up, so that many codes are met
        inner = model.model.vqmodel
        found = inner.quant_conv(inner.encoder(pixels(8, SIDE, seed=9))).permute(0, 2, 3, 1).flatten(0, 2)
        inner.quantize.embedding.weight.copy_(found[:CODES])
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Published]:
    theirs = chameleon()
    return theirs, load_published(saved(theirs, tmp_path_factory.mktemp("chameleon")))


def inputs(*pictures: int, side: int = SIDE) -> dict[str, Tensor]:
    """A row of words for each number, with the places of so many pictures in it; rows are equally long."""
    slots = (side // 4) ** 2
    length = 12 + max(pictures) * slots
    words = torch.randint(6, 50, (len(pictures), length), generator=torch.Generator().manual_seed(3))
    for row, several in enumerate(pictures):
        words[row, 2 : 2 + several * slots] = IMAGE
    return {"input_ids": words} | ({"pixel_values": pixels(sum(pictures), side)} if any(pictures) else {})


def logits(model: Any, **given: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def compare(theirs: Any, ours: Published, given: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours.logits(**given), logits(theirs, **given), **TOLERANCE)
    with torch.no_grad():
        greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)[:, given["input_ids"].shape[1] :]
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy)


@pytest.mark.parametrize("pictures", [(1,), (1, 2), (0, 0)])
def test_logits_and_greedy_tokens(pair: tuple[Any, Published], pictures: tuple[int, ...]) -> None:
    theirs, ours = pair
    given = inputs(*pictures)
    compare(theirs, ours, given)
    if any(pictures):
        other = given | {"pixel_values": pixels(sum(pictures), SIDE, seed=5)}
        assert (ours.logits(**other) - ours.logits(**given)).abs().max() > 0.01
    written = ours.generate_ids(**given, max_new_tokens=32)
    assert not torch.isin(written, torch.tensor(list(WORDS.values()))).any()


@pytest.mark.parametrize(
    "change", [{"swin": True}, {"vq": {"attn_resolutions": [4, 16]}}, {"vq": {"num_res_blocks": 1}}]
)
def test_other_settings(tmp_path: Path, change: dict[str, Any]) -> None:
    theirs = chameleon(**change)
    compare(theirs, load_published(saved(theirs, tmp_path)), inputs(2))


def test_codes_of_pictures_of_any_grid(pair: tuple[Any, Published]) -> None:
    theirs, ours = pair
    images = [pixels(2, SIDE), torch.randn(1, 3, 8, 20, generator=torch.Generator().manual_seed(4))]
    found = ours.model.fusion(ours.model.encoder(join([patchify(image, 4) for image in images]))).ids
    with torch.no_grad():
        wanted = torch.cat([theirs.model.get_image_tokens(image).flatten() for image in images])
    assert torch.equal(found, wanted.long())
    assert len(set(found.tolist())) > 10  # not one code for everything


def test_left_padded_batch(pair: tuple[Any, Published]) -> None:
    theirs, ours = pair
    given = inputs(1, 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["input_ids"] = torch.cat([torch.full((2, 3), 7), given["input_ids"]], dim=1)
    given["attention_mask"] = torch.cat([torch.tensor([[0] * 3, [1] * 3]), given["attention_mask"]], dim=1)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(ours.logits(**given)[real], logits(theirs, **given)[real], **TOLERANCE)


def test_what_we_save_loads_in_transformers_and_here(pair: tuple[Any, Published], tmp_path: Path) -> None:
    """What turns codes back into pictures is not read, so it is not written."""
    theirs, ours = pair
    ours.save(tmp_path)
    again, told = hf.ChameleonForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[2] for key in told["missing_keys"]} == {"post_quant_conv"} and not told["unexpected_keys"]
    given = inputs(1)
    assert torch.equal(logits(again.eval(), **given), logits(theirs, **given))
    assert torch.equal(load_published(tmp_path).logits(**given), ours.logits(**given))


def test_without_a_map_the_decoder_is_read_alone(tmp_path: Path) -> None:
    theirs = chameleon()
    saved(theirs, tmp_path)
    c = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**c, "vocabulary_map": None}))
    ours, given = load_published(tmp_path), inputs(0)
    told = torch.tensor([n for n in range(99) if n not in WORDS.values()])
    torch.testing.assert_close(ours.logits(**given)[..., told], logits(theirs, **given)[..., told], **TOLERANCE)
    with pytest.raises(InputError, match="has no vocabulary_map, without which pictures have no words"):
        ours.logits(**inputs(1))


def test_maps_and_inputs_that_make_no_sense_are_told(pair: tuple[Any, Published]) -> None:
    c = pair[0].config.to_dict()
    with pytest.raises(ConfigError, match="vocabulary_map names 39 codes, expected one name for each of 40"):
        family.config({**c, "vocabulary_map": dict(list(WORDS.items())[1:])})
    with pytest.raises(ConfigError, match="a name after IMGIMG is no number"):
        family.config({**c, "vocabulary_map": {"IMGIMGXZ": 3}})
    with pytest.raises(ConfigError, match="unwritten ids up to 89, expected 0 to 59"):
        family.config({**c, "vocab_size": 60})
    with pytest.raises(InputError, match=r"^16 image tokens in input_ids, the pictures need 32$"):
        pair[1].logits(**inputs(1) | {"pixel_values": pixels(2, SIDE)})
    with pytest.raises(InputError, match=r"^16 image tokens in input_ids, but no pixel_values$"):
        pair[1].logits(input_ids=inputs(1)["input_ids"])


def test_the_published_size() -> None:
    row = ROWS["chameleon-7b"]
    with torch.device("meta"):
        theirs = hf.ChameleonForConditionalGeneration(hf.ChameleonConfig(vocabulary_map=row.config["vocabulary_map"]))
    unread = sum(p.numel() for p in theirs.model.vqmodel.post_quant_conv.parameters())
    assert count(row.model) == sum(p.numel() for p in theirs.parameters()) - unread
    told = describe(row.name, row.model)
    assert told.visual_tokens == 1024
    assert told.pipeline[2].note == "5 levels of 2 blocks, the nearest of 8192 codes"


# -------------------------------------------------------------------------------------------------------- processor


@pytest.mark.parametrize("size", [(57, 31), (20, 90), (32, 32), (33, 65)])
def test_pixels_as_the_published_processor(size: tuple[int, int]) -> None:
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    theirs = ChameleonImageProcessorPil(**sizes)(picture(*size), return_tensors="pt")["pixel_values"][0]
    ours = family.pixels(sizes, 0).seen(picture(*size)).pixels[0]
    assert (ours - theirs).abs().max() <= 0.0078 + 1e-5


def test_a_folder_answers_questions(tmp_path: Path) -> None:
    controls = ("<unk>", "<s>", "</s>", "<image>", "<racm3:break>", "<eoss>", "<reserved08706>")
    tokenizer = train_tokenizer(["what is in this picture?"] * 30, 400, controls)
    image = tokenizer.control("<image>")
    words = {name: 350 + n for n, name in enumerate(WORDS)}
    saved(chameleon(vocab_size=400, vocabulary_map={"<image>": image, **words}), tmp_path)
    tokenizer.save(tmp_path)
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(sizes))
    model = sightline.load(tmp_path)
    processor = model.engine.processor
    example = processor(ask("what is it?", Image(picture(33, 21))))
    said = processor.tokenizer.decode(example.ids.tolist(), skip_control=False)
    assert said == f"<s><racm3:break>{'<image>' * SLOTS}<eoss>what is it?<reserved08706>"
    theirs = hf.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(said)["input_ids"] == example.ids.tolist()
    assert model.ask(picture(33, 21), "what?", max_new_tokens=3).usage["image_tokens"] == SLOTS
    with pytest.raises(InputError, match="this model's form of a conversation is one question"):
        family.template((*ask("a", answer="b"), *ask("c")))
