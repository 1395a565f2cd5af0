"""BLIP-2 and InstructBLIP against transformers, from folders in the published layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import IMAGE_TOKEN, TEXT, pixels, randomised, saved
from torch import Tensor, nn

from sightline.core.errors import ConfigError, InputError
from sightline.zoo.published import load_published

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
QUERIES = 5
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 7, "initializer_range": 0.02}
QFORMER: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 40}
QFORMER |= {"intermediate_size": 40, "max_position_embeddings": 16}
T5: dict[str, Any] = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "feed_forward_proj": "gated-gelu"}
T5 |= {"eos_token_id": None, "decoder_start_token_id": 0, "dense_act_fn": "gelu"}
DECODERS, BESIDE = ("blip-2", "blip-2-opt", "instructblip"), ("blip-2-t5", "instructblip-t5")
ALL = pytest.mark.parametrize("family", [*DECODERS, *BESIDE])


def build(family: str) -> Any:
    text = hf.LlamaConfig(**TEXT).to_dict()
    if family == "blip-2-opt":
        text = hf.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32).to_dict()
    if family in BESIDE:
        text = hf.T5Config(**T5, tie_word_embeddings=False).to_dict()
    sizes: dict[str, Any] = {"num_query_tokens": QUERIES, "image_token_index": IMAGE_TOKEN}
    config, kind = hf.Blip2Config, hf.Blip2ForConditionalGeneration
    if family.startswith("instructblip"):
        config, kind = hf.InstructBlipConfig, hf.InstructBlipForConditionalGeneration
    model = kind(config(vision_config=VISION, qformer_config=QFORMER, text_config=text, **sizes))
    if family in BESIDE:  # transformers 5 ties it until a file tells otherwise
        model.language_model.lm_head.weight = nn.Parameter(torch.zeros(99, 32))
    model = randomised(model)
    parts = (model.vision_model, model.qformer, model.language_projection)
    with torch.no_grad():  # larger, or three layers of norms leave little of the picture and less of the instruction
        for parameter in (p for part in parts for p in part.parameters()):
            parameter.mul_(4)
        if family in BESIDE:
            for parameter in model.language_model.parameters():
                parameter.mul_(2)
    return model


def inputs(family: str, rows: int = 2, pictures: int = 1) -> dict[str, Tensor]:
    """So many pictures before each row's text, what is written where that is apart; some instructions are shorter."""
    words = torch.randint(3, 90, (rows, 9), generator=torch.Generator().manual_seed(8))
    count = rows * pictures
    given = {"input_ids": torch.cat([torch.full((rows, pictures * QUERIES), IMAGE_TOKEN), words], dim=1)}
    given["pixel_values"] = pixels(count)
    if family.startswith("instructblip"):
        given["qformer_input_ids"] = torch.tensor([[3, 9, 4, 7], [8, 5, 0, 0]]).repeat(pictures, 1)[:count]
        given["qformer_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).repeat(pictures, 1)[:count]
    if family in BESIDE:
        given["decoder_input_ids"] = torch.randint(3, 90, (rows, 7), generator=torch.Generator().manual_seed(9))
        given["attention_mask"] = (torch.arange(given["input_ids"].shape[1]) < torch.tensor([[99], [12]])).long()[:rows]
    return given


@ALL
@pytest.mark.parametrize("pictures", [1, 2])
def test_logits(tmp_path: Path, family: str, pictures: int) -> None:
    theirs = build(family)
    ours = load_published(saved(theirs, tmp_path))
    given = inputs(family, pictures=pictures)
    with torch.no_grad():
        wanted = theirs(**given).logits
        seen = theirs.vision_model(given["pixel_values"]).last_hidden_state
    torch.testing.assert_close(ours.features(given["pixel_values"]), seen, **TOLERANCE)
    torch.testing.assert_close(ours.logits(**given), wanted, **TOLERANCE)
    other = {**given, "pixel_values": pixels(2 * pictures, seed=5)}
    assert (ours.logits(**other) - wanted).abs().max() > 0.01  # the pictures are seen


@ALL
def test_without_a_picture_it_is_its_language_model(tmp_path: Path, family: str) -> None:
    """Which the published model is never asked for: it wants pictures."""
    theirs = build(family)
    ours = load_published(saved(theirs, tmp_path))
    given = {k: v for k, v in inputs(family, pictures=0).items() if not k.startswith(("pixel", "qformer"))}
    with torch.no_grad():
        wanted = theirs.language_model(**given).logits
        asked = {k: v for k, v in given.items() if k != "decoder_input_ids"}
        greedy = theirs.language_model.generate(**asked, max_new_tokens=32, do_sample=False)[:, -32:]
    torch.testing.assert_close(ours.logits(**given), wanted, **TOLERANCE)
    if "attention_mask" not in asked or bool(asked["attention_mask"].all()):
        assert torch.equal(ours.generate_ids(**asked, max_new_tokens=32), greedy)


@pytest.mark.parametrize("family", ["instructblip", "instructblip-t5"])
def test_the_instruction_changes_what_is_seen(tmp_path: Path, family: str) -> None:
    ours = load_published(saved(build(family), tmp_path))
    given = inputs(family)
    asked = {**given, "qformer_input_ids": given["qformer_input_ids"] + 1}
    assert (ours.logits(**asked) - ours.logits(**given)).abs().max() > 0.01


@ALL
@pytest.mark.parametrize("pictures", [1, 2])
def test_greedy_tokens(tmp_path: Path, family: str, pictures: int) -> None:
    """An encoder-decoder begins with its start token, whatever is padded of what it reads."""
    theirs = build(family)
    ours = load_published(saved(theirs, tmp_path))
    given = inputs(family, pictures=pictures)
    given.pop("decoder_input_ids", None)
    with torch.no_grad():
        greedy = theirs.generate(**given, max_new_tokens=32, do_sample=False)
    assert torch.equal(ours.generate_ids(**given, max_new_tokens=32), greedy[:, -32:])


@pytest.mark.parametrize("family", BESIDE)
def test_what_is_written_already_is_gone_on_with(tmp_path: Path, family: str) -> None:
    ours = load_published(saved(build(family), tmp_path))
    given = inputs(family)
    given.pop("decoder_input_ids")
    whole = ours.generate_ids(**given, max_new_tokens=8)
    start = torch.cat([torch.zeros(2, 1, dtype=torch.int64), whole[:, :3]], dim=1)
    assert torch.equal(ours.generate_ids(**given, decoder_input_ids=start, max_new_tokens=5), whole[:, 3:])


@pytest.mark.parametrize("family", BESIDE)
def test_the_gate_is_the_exact_one(tmp_path: Path, family: str) -> None:
    """The published files say both "gated-gelu", which means the approximation, and the exact GELU: that one counts."""
    ours = load_published(saved(build(family), tmp_path))
    assert ours.model.config.decoder.activation == "gelu" and not ours.model.config.decoder.tied


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


def test_what_is_written_is_asked_for_and_checked(tmp_path: Path) -> None:
    given, beside = inputs("blip-2-t5"), load_published(saved(build("blip-2-t5"), tmp_path / "beside"))
    with pytest.raises(InputError, match="a blip-2 model needs decoder_input_ids"):
        beside.logits(**{**given, "decoder_input_ids": None})
    with pytest.raises(InputError, match="decoder_input_ids: found 1 rows, expected 2 as in input_ids"):
        beside.logits(**{**given, "decoder_input_ids": given["decoder_input_ids"][:1]})
    with pytest.raises(InputError, match=r"decoder_input_ids from .* expected 0 to 98"):
        beside.logits(**{**given, "decoder_input_ids": given["decoder_input_ids"] + 99})
    with pytest.raises(InputError, match=r"decoder_input_ids: found torch\.float32"):
        beside.logits(**{**given, "decoder_input_ids": torch.ones(2, 3)})
    plain = load_published(saved(build("blip-2"), tmp_path / "plain"))
    with pytest.raises(InputError, match="decoder_input_ids are for a model that writes beside what it reads"):
        plain.logits(**given)


def test_a_file_without_a_token_for_pictures_is_refused(tmp_path: Path) -> None:
    theirs = build("blip-2")
    theirs.config.image_token_index = None
    with pytest.raises(ConfigError, match="no image_token_index"):
        load_published(saved(theirs, tmp_path))
