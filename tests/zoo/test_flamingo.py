"""OpenFlamingo and Otter by their folders: conversations in their own form, settings that are not known refused."""

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import sightline
from sightline.core.errors import CheckpointError, ConfigError, InputError
from sightline.core.sequence import Conversation, Image, Message, Text
from sightline.data.template import Control, End, Slot, Words
from sightline.language.tokenizer import train_tokenizer
from sightline.model import VLM
from sightline.zoo import flamingo
from sightline.zoo.checkpoint import write
from sightline.zoo.families import FAMILIES, ROWS
from sightline.zoo.languages import language_config

CLIP = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
CLIP |= {"image_size": 28, "patch_size": 7}
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 4, "vocab_size": 500, "max_seq_len": 256}
PICTURE = Image(PIL.Image.new("RGB", (50, 40), "red"))


def user(*words: str, picture: bool = True) -> Message:
    return Message("user", (*([PICTURE] if picture else []), *map(Text, words)))


SHOTS: Conversation = (user("how many?"), Message("assistant", (Text("two"),)), user("and here?"))


def test_open_flamingo_learns_from_examples_before_the_question() -> None:
    end = End("<|endofchunk|>")
    asked = [Words("Question:how many? Short answer:"), Words("two", learned=True), end]
    wanted = [Slot(0), *asked, Slot(1), Words("Question:and here? Short answer:")]
    assert flamingo.flamingo_template(SHOTS) == wanted
    assert flamingo.flamingo_template((user(),)) == [Slot(0), Words("Output:")]


def test_otter_s_turns() -> None:
    said: Conversation = (*SHOTS[:2], user("and there?", picture=False))
    wanted = [
        *(Slot(0), Words("User: how many? GPT:"), Control("<answer>"), Words("two", learned=True)),
        *(End("<|endofchunk|>"), Words("User: and there? GPT:"), Control("<answer>")),
    ]
    assert flamingo.otter_template(said) == wanted


@pytest.mark.parametrize("template", [flamingo.flamingo_template, flamingo.otter_template])
def test_a_system_message_is_refused(template: Any) -> None:
    with pytest.raises(InputError, match="no place for a system message"):
        template((Message("system", (Text("be brief"),)), user("how many?")))


def folder(path: Path, kind: str, **more: Any) -> Path:
    """A random checkpoint whose tokenizer knows the family's control tokens."""
    c = {"model_type": kind, "vision_config": CLIP, "text_config": MPT, "media_token_id": 1, **more}
    torch.manual_seed(0)
    model = VLM(flamingo.config(c))
    write(path, FAMILIES[kind].keys(model.config).save(model.state_dict()), c)
    controls = ("<|endofchunk|>", "<image>", "<answer>", "<PAD>")
    train_tokenizer(["User: how many red circles are there? GPT:"] * 30, 500, controls).save(path)
    return path


@pytest.mark.parametrize("kind", ["otter", "flamingo", "open_flamingo"])
def test_a_folder_answers_questions(tmp_path: Path, kind: str) -> None:
    model = sightline.load(folder(tmp_path, kind))
    processor = model.engine.processor
    assert processor.tokenizer.eos == "<|endofchunk|>"
    example = processor(SHOTS)
    assert example.item.max() == 2 and len(example.slots) == 2 and len(example.pixels) == 2
    answer = model.ask(PIL.Image.new("RGB", (50, 40)), "how many?", max_new_tokens=3)
    assert answer.usage["image_tokens"] == 1 and answer.usage["completion_tokens"] <= 3


def test_a_conversation_and_the_published_inputs_are_the_same(tmp_path: Path) -> None:
    """What the processor makes of a question gives the logits that the published keywords give."""
    from sightline.data.batch import collate

    model = sightline.load(folder(tmp_path, "otter"))
    with torch.no_grad():
        for name, parameter in model.published.model.named_parameters():
            if "gate" in name:
                parameter.fill_(1.0)
    example = model.engine.processor(SHOTS)
    batch = collate([example], 7, 0)
    seen = torch.stack(example.pixels)[None, :, None]
    wanted = model.logits(lang_x=batch.ids, vision_x=seen)
    runner = model.published.runner
    torch.testing.assert_close(runner.logits(runner(batch)), wanted, atol=1e-6, rtol=0.0)


def test_pickles_are_told_how_to_be_converted(tmp_path: Path) -> None:
    found = folder(tmp_path, "open_flamingo")
    (found / "model.safetensors").rename(found / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is a pickle.*convert it to safetensors"):
        sightline.load(found)


def test_a_video_of_more_frames_than_have_embeddings_is_refused(tmp_path: Path) -> None:
    model = sightline.load(folder(tmp_path, "otter", max_num_frames=2))
    ids = torch.tensor([[5, 1, 7]])
    assert model.logits(lang_x=ids, vision_x=torch.zeros(1, 1, 2, 3, 28, 28)).shape == (1, 3, 500)
    with pytest.raises(ConfigError, match="a video of 3 frames, this resampler has embeddings for 2"):
        model.logits(lang_x=ids, vision_x=torch.zeros(1, 1, 3, 3, 28, 28))


def test_branches_side_by_side_are_refused() -> None:
    with pytest.raises(ConfigError, match="use_parallel_residual is True, expected False"):
        language_config({"model_type": "gpt_neox"})


@pytest.mark.parametrize(
    "name, places", [("openflamingo-3b", 24), ("openflamingo-4b", 16), ("openflamingo-9b", 8), ("otter-llama-7b", 8)]
)
def test_rows_have_the_published_number_of_blocks(name: str, places: int) -> None:
    model = ROWS[name].model
    found = model.fusion.places(model.decoder.depth)  # type: ignore[union-attr]
    assert len(found) == places and found[-1] == model.decoder.depth - 1
