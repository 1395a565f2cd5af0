"""Prompts and pictures of BLIP-2 and InstructBLIP as the published processors write them."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf
from blip_folders import KINDS, NAMES, QUERIES, SIDE, blip_folder
from picture_files import FILES
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import sightline
from sightline.core.sequence import Image, ask
from sightline.data.media import open_image

PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8))
QUESTION = "how many red circles are there?"
ALL = pytest.mark.parametrize("kind", KINDS)


def published(folder: Path, kind: str) -> Any:
    """The published processor of a folder's files."""
    names = {k: v for k, v in NAMES.items() if not (kind.endswith("t5") and k == "bos_token")}
    words = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    pictures = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    if kind.startswith("blip-2"):
        return hf.Blip2Processor(pictures, words, num_query_tokens=QUERIES)
    bert = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "qformer_tokenizer" / "tokenizer.json"))
    return hf.InstructBlipProcessor(pictures, words, bert, num_query_tokens=QUERIES)


@ALL
@pytest.mark.parametrize("question", [QUESTION, "What is in the picture? <image> </s> [SEP]"])
def test_prompts_and_pictures(tmp_path: Path, kind: str, question: str) -> None:
    """What a user types is never a control token here, so words are compared that hold none."""
    theirs = published(blip_folder(tmp_path / "blip", kind), kind)
    ours = sightline.load(tmp_path / "blip").engine.processor
    forged = "<image>" in question
    text = f"Question: {question} Answer:" if kind.startswith("blip-2") else question
    wanted = theirs(images=PICTURE, text=text, return_tensors="pt")
    read = ours(ask(question, Image(PICTURE))).read
    assert torch.equal(read.ids, wanted["input_ids"][0]) is not forged
    assert read.slots.tolist() == list(range(QUERIES))
    scale = torch.tensor(theirs.image_processor.image_std)[:, None, None]
    assert float(((read.pixels[0] - wanted["pixel_values"][0]) * scale).abs().max()) < 1 / 255
    if kind.startswith("instructblip"):
        assert read.instruction is not None
        assert torch.equal(read.instruction, wanted["qformer_input_ids"][0]) is not forged
    else:
        assert read.instruction is None


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
def test_fifty_pictures(tmp_path: Path, kind: str) -> None:
    theirs = published(blip_folder(tmp_path / "blip", kind), kind)
    ours = sightline.load(tmp_path / "blip").engine.processor
    scale = torch.tensor(theirs.image_processor.image_std)[:, None, None]
    text = f"Question: {QUESTION} Answer:" if kind.startswith("blip-2") else QUESTION
    for data in FILES:
        picture = open_image(data)
        wanted = theirs(images=picture.picture, text=text, return_tensors="pt")
        read = ours(ask(QUESTION, picture)).read
        assert torch.equal(read.ids, wanted["input_ids"][0])
        assert float(((read.pixels[0] - wanted["pixel_values"][0]) * scale).abs().max()) <= 1 / 255 + 1e-6


@ALL
def test_without_a_picture(tmp_path: Path, kind: str) -> None:
    theirs = published(blip_folder(tmp_path / "blip", kind), kind)
    ours = sightline.load(tmp_path / "blip").engine.processor
    text = f"Question: {QUESTION} Answer:" if kind.startswith("blip-2") else QUESTION
    read = ours(ask(QUESTION)).read
    assert torch.equal(read.ids, theirs(text=text, return_tensors="pt")["input_ids"][0])
    assert read.instruction is None and not len(read.slots)


@ALL
def test_what_is_asked_in_words_is_what_is_asked_in_numbers(tmp_path: Path, kind: str) -> None:
    """`ask` writes what the published inputs lead to, token by token."""
    theirs = published(blip_folder(tmp_path / "blip", kind), kind)
    model = sightline.load(tmp_path / "blip")
    text = f"Question: {QUESTION} Answer:" if kind.startswith("blip-2") else QUESTION
    ids = model.generate_ids(**theirs(images=PICTURE, text=text, return_tensors="pt"), max_new_tokens=6)
    (reply,) = model.engine.answer([ask(QUESTION, Image(PICTURE))], sightline.Sampling(max_new_tokens=6))
    assert list(reply.ids) == ids[0, : len(reply.ids)].tolist() and len(reply.ids) > 0
