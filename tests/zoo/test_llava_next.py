"""LLaVA-NeXT from a folder: questions about pictures of any size, alone, together and packed for training."""

import json
from time import process_time

import PIL.Image
import pytest
import torch

import sightline
from sightline.core.sequence import Image, Message, Text, ask
from sightline.data.batch import collate, pack
from sightline.language.tokenizer import train_tokenizer
from sightline.model import VLM
from sightline.serving.assistant import Assistant
from sightline.zoo import llava_next
from sightline.zoo.checkpoint import write
from sightline.zoo.describe import describe
from sightline.zoo.families import ROWS

CONTROLS = ("<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>")
PICTURES = [PIL.Image.effect_noise(size, 90).convert("RGB") for size in ((50, 40), (120, 30), (9, 70), (28, 28))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": 400, "model_type": "mistral", "num_key_value_heads": 2, "max_position_embeddings": 900}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    c = {"model_type": "llava_next", "image_token_index": 3, "text_config": text}
    c |= {"vision_config": {**vision, "image_size": 28, "patch_size": 7}}
    folder = tmp_path_factory.mktemp("next")
    config = llava_next.config(c)
    made = VLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.15)
    write(folder, llava_next.keys(config).save(made.state_dict()), c)
    train_tokenizer(["how many red circles are there?"] * 30, 400, CONTROLS).save(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_grid_pinpoints": [[28, 56], [56, 28]]}))
    return sightline.load(folder)


def test_every_size_has_its_own_number_of_tokens(model: Assistant) -> None:
    counts = [model.ask(picture, "how many?", max_new_tokens=2).usage["image_tokens"] for picture in PICTURES]
    assert counts == [16 + 4 * 7, 16 + 2 * 9, 16 + 8 * 3, 16 + 4 * 5]


def test_answers_together_are_answers_one_by_one(model: Assistant) -> None:
    """Rows of several sizes, one with two pictures, and two questions that share their picture."""
    first, second, *_ = (Image(picture) for picture in PICTURES)
    talks = [ask("how many?", Image(picture)) for picture in PICTURES]
    talks += [ask("how many red?", first), ask("how many?", first, second), ask("how many?")]
    together = model.answer(talks)
    alone = [model.answer([talk])[0] for talk in talks]
    assert [answer.error for answer in together] == [None] * len(talks)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert together[5].usage["image_tokens"] == sum(together[i].usage["image_tokens"] for i in (0, 1))


def test_pictures_alike_but_of_other_sizes_share_nothing(model: Assistant) -> None:
    """Of one colour, their views are the same; how they are laid out is not."""
    plain = [Image(PIL.Image.new("RGB", size)) for size in ((40, 38), (40, 40))]
    talks = [ask("how many?", image) for image in plain]
    together = model.answer(talks)
    assert [a.text for a in together] == [model.answer([talk])[0].text for talk in talks]


def test_packed_examples_are_examples_one_by_one(model: Assistant) -> None:
    """Hidden states of the answers' tokens, and gradients that reach the newline."""
    vlm = model.published.model
    assert isinstance(vlm, VLM)
    processor = model.engine.processor
    talks = [(*ask(f"how many {i}?", Image(p)), Message("assistant", (Text("two"),))) for i, p in enumerate(PICTURES)]
    examples = [processor(talk) for talk in talks]
    row = pack(examples, 7, 0, sum(example.length for example in examples))
    assert len(row.ids) == 1
    order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    wanted = torch.cat([vlm(collate([examples[i]], 7, 0))[0] for i in order])
    found = vlm(row)[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    found.square().sum().backward()
    newline = vlm.fusion.newline
    assert isinstance(newline, torch.Tensor) and newline.grad is not None and newline.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ({"model_type": "mistral"}, "<s>[INST] #\nhow? [/INST]"),
        ({"model_type": "llama", "vocab_size": 64_064}, "<|im_start|>system\nAnswer the questions.<|im_end|>"),
        ({"model_type": "llama", "vocab_size": 32_064}, "<s>A chat between a curious user"),
    ],
)
def test_each_text_half_has_its_form_of_conversation(text: dict[str, object], wanted: str) -> None:
    segments = llava_next.habits({"text_config": text}).template(ask("how?", Image(PICTURES[0])))
    shown = "".join(getattr(s, "text", getattr(s, "name", "#")) for s in segments)
    assert shown.startswith(wanted)


def test_the_largest_is_described_at_once() -> None:
    began = process_time()
    told = describe("34b", ROWS["llava-1.6-34b"].model)
    assert process_time() - began < 2.0
    assert told.visual_tokens == 577 and 34e9 < sum(told.parameters.values()) < 36e9
