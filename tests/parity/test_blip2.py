"""BLIP-2 and InstructBLIP against transformers, from folders in the published layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import IMAGE_TOKEN, TEXT, pixels, randomised, saved
from torch import Tensor

from sightline.core.errors import ConfigError, InputError
from sightline.zoo.published import load_published

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
QUERIES = 5
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 7, "initializer_range": 0.02}
QFORMER: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 40}
QFORMER |= {"intermediate_size": 40, "max_position_embeddings": 16}
ALL = pytest.mark.parametrize("family", ["blip-2", "blip-2-opt", "instructblip"])


def build(family: str) -> Any:
    kinds = {
        "blip-2": (hf.Blip2Config, hf.Blip2ForConditionalGeneration),
        "blip-2-opt": (hf.Blip2Config, hf.Blip2ForConditionalGeneration),
        "instructblip": (hf.InstructBlipConfig, hf.InstructBlipForConditionalGeneration),
    }
    text = hf.LlamaConfig(**TEXT).to_dict()
    if family == "blip-2-opt":
        text = hf.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32).to_dict()
    sizes: dict[str, Any] = {"num_query_tokens": QUERIES, "image_token_index": IMAGE_TOKEN}
    config, kind = kinds[family]
    model = randomised(kind(config(vision_config=VISION, qformer_config=QFORMER, text_config=text, **sizes)))
    with torch.no_grad():  # larger, or three layers of norms leave little of the picture and less of the instruction
        for part in (model.vision_model, model.qformer, model.language_projection):
            for parameter in part.parameters():
                parameter.mul_(4)
    return model


def inputs(family: str, rows: int = 2) -> dict[str, Tensor]:
    """A picture before each row's text; the second instruction is the shorter."""
    words = torch.randint(3, 90, (rows, 9), generator=torch.Generator().manual_seed(8))
    ids = torch.cat([torch.full((rows, QUERIES), IMAGE_TOKEN), words], dim=1)
    given = {"input_ids": ids, "pixel_values": pixels(rows)}
    if family == "instructblip":
        given["qformer_input_ids"] = torch.tensor([[3, 9, 4, 7], [8, 5, 0, 0]])[:rows]
        given["qformer_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])[:rows]
    return given


@ALL
def test_logits(tmp_path: Path, family: str) -> None:
    theirs = build(family)
    ours = load_published(saved(theirs, tmp_path))
    given = inputs(family)
    with torch.no_grad():
        wanted = theirs(**given).logits
        seen = theirs.vision_model(given["pixel_values"]).last_hidden_state
    torch.testing.assert_close(ours.features(given["pixel_values"]), seen, **TOLERANCE)
    torch.testing.assert_close(ours.logits(**given), wanted, **TOLERANCE)
    other = {**given, "pixel_values": pixels(2, seed=5)}
    assert (ours.logits(**other) - wanted).abs().max() > 0.01  # the pictures are seen


def test_the_instruction_changes_what_is_seen(tmp_path: Path) -> None:
    ours = load_published(saved(build("instructblip"), tmp_path))
    given = inputs("instructblip")
    asked = {**given, "qformer_input_ids": given["qformer_input_ids"] + 1}
    assert (ours.logits(**asked) - ours.logits(**given)).abs().max() > 0.01


@ALL
def test_greedy_tokens(tmp_path: Path, family: str) -> None:
    theirs = build(family)
    ours = load_published(saved(theirs, tmp_path))
    given = inputs(family)
    with torch.no_grad():
        greedy = theirs.generate(**given, max_new_tokens=16, do_sample=False)
    greedy = greedy[:, -16:]
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=16), greedy)


@ALL
def test_what_we_save_loads_in_transformers(tmp_path: Path, family: str) -> None:
    theirs = build(family)
    ours = load_published(saved(theirs, tmp_path / "theirs"))
    ours.save(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    given = inputs(family)
    with torch.no_grad():
        assert torch.equal(again(**given).logits, theirs(**given).logits)


def test_instructions_are_asked_for_and_checked(tmp_path: Path) -> None:
    ours = load_published(saved(build("instructblip"), tmp_path / "instructed"))
    given = inputs("instructblip")
    with pytest.raises(InputError, match="reads an instruction with each picture, none was given"):
        ours.logits(input_ids=given["input_ids"], pixel_values=given["pixel_values"])
    with pytest.raises(InputError, match="from 0 to 39"):
        ours.logits(**{**given, "qformer_input_ids": given["qformer_input_ids"] + 40})
    with pytest.raises(InputError, match=r"qformer_attention_mask is \[2, 3\], expected \[2, 4\]"):
        ours.logits(**{**given, "qformer_attention_mask": torch.ones(2, 3)})
    plain = load_published(saved(build("blip-2"), tmp_path / "plain"))
    with pytest.raises(InputError, match="a blip-2 model takes no qformer_input_ids"):
        plain.logits(**given)


def test_a_file_without_a_token_for_pictures_is_refused(tmp_path: Path) -> None:
    theirs = build("blip-2")
    theirs.config.image_token_index = None
    with pytest.raises(ConfigError, match="no image_token_index"):
        load_published(saved(theirs, tmp_path))
