"""What a run begins from: parts that are not here are told, blocks of a fusion stand between those that are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sightline.core.config import from_dict, override, to_dict
from sightline.core.errors import CheckpointError, ConfigError
from sightline.core.layout import causal_layout
from sightline.encoders.vit import ViT, ViTConfig
from sightline.fusion.cross_attention import CrossAttentionConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.fusion.visual_expert import VisualExpertConfig
from sightline.language.decoder import Decoder
from sightline.model import VLM
from sightline.recipes import recipe as named
from sightline.training.recipe import Parts, Recipe
from sightline.training.run import initial_model, run
from sightline.training.starting import contradiction, grown, load_start, missing, resized, still_to_give
from sightline.zoo import own
from sightline.zoo.own import ProcessorConfig


def test_what_is_missing_is_one_line_with_the_way_to_give_it(tmp_path: Path) -> None:
    chosen = named("llava-1.5-7b")
    given = override(chosen, ["sources.lcs_558k.path=rows.json"])
    with pytest.raises(ConfigError) as told:
        next(run(given, tmp_path / "run", "align"))
    assert str(told.value) == (
        "parts that recipe 'llava-1.5-7b' begins from are not here; set start.encoder=FOLDER "
        "(openai/clip-vit-large-patch14-336), start.decoder=FOLDER (lmsys/vicuna-7b-v1.5)"
    )
    with pytest.raises(ConfigError, match=r"names no file; set sources\.lcs_558k.*start\.encoder=FOLDER"):
        next(run(chosen, tmp_path / "run", "align"))
    assert not (tmp_path / "run").exists()
    here = override(given, [f"start.encoder={tmp_path}"])
    assert missing(here) == {"start.decoder": "lmsys/vicuna-7b-v1.5"}
    later = named("cogvlm")
    assert still_to_give(later).endswith("is not here; set start=FOLDER (runs/cogvlm-224/model)")
    assert still_to_give(override(later, ["start=''"])) == ""
    assert still_to_give(override(given, ["start=sightline-mini"])) == ""


def test_a_later_stage_waits_for_the_one_that_begins_from_parts(
    recipe: Recipe, tmp_path: Path, tiny_folder: Path
) -> None:
    started = replace(recipe, start=Parts(decoder=str(tiny_folder)), vocabulary=600)
    started = replace(started, model=replace(recipe.model, decoder=replace(recipe.model.decoder, vocab_size=600)))
    with pytest.raises(CheckpointError, match="stage 'language' is not finished; train it before 'align'"):
        next(run(started, tmp_path / "run", "align", workers=0))


def test_parts_survive_their_plain_form() -> None:
    chosen = named("blip2-opt-2.7b")
    assert isinstance(chosen.start, Parts)
    assert from_dict(Recipe, to_dict(chosen)) == chosen
    with pytest.raises(ConfigError, match=r"unknown key 'start\.encodre'; did you mean 'encoder'"):
        from_dict(Recipe, {**to_dict(chosen), "start": {"encodre": "x"}})
    with pytest.raises(ConfigError, match="starts from parts, of which `taken` chooses nothing"):
        replace(chosen, taken=("encoder.*",))


# -------------------------------------------------------------------------------------------------------------- weights


def exported(model: VLM, tokenizer: Any, folder: Path) -> str:
    own.save(model, tokenizer, ProcessorConfig(named("tiny").pixels), folder, dtype=torch.float32)
    return str(folder)


@pytest.mark.parametrize("kind", ["cross-attention", "expert"])
def test_a_fusion_inside_the_decoder_does_not_move_its_words(
    recipe: Recipe, tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    """A language model without one gives its blocks to a decoder that has one, and back, and the fusion apart."""
    plain = replace(recipe.model, decoder=replace(recipe.model.decoder, depth=3))
    fusions = {
        "cross-attention": CrossAttentionConfig(inputs=16, width=24, heads=2, mlp=32, interval=2),
        "expert": VisualExpertConfig(ProjectorConfig(inputs=16, width=24)),
    }
    torch.manual_seed(5)
    words = VLM(plain)
    inside = replace(recipe, model=replace(plain, fusion=fusions[kind]))
    start = exported(words, tokenizer, tmp_path / "words")
    model = initial_model(inside)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_start(replace(inside, start=Parts(decoder=start)), model)
    ids = torch.arange(12)[None]
    layout = causal_layout(1, 12)
    with torch.no_grad():
        a, b = (each.decoder(each.decoder.embed(ids), layout) for each in (words, model))
    assert torch.allclose(a, b, atol=1e-6)
    fusion = {
        name: value for name, value in model.state_dict().items() if "cross" in name or name.startswith("fusion.")
    }
    assert all(torch.equal(value, before[name]) for name, value in fusion.items())
    if kind == "expert":
        block = model.decoder.blocks[1]
        assert torch.equal(block.vision.q.weight, block.attention.q.weight)
        assert torch.equal(block.vision.feedforward.up.weight, block.feedforward.up.weight)
    back, again = initial_model(replace(recipe, model=plain)), initial_model(inside)
    whole = exported(model, tokenizer, tmp_path / "whole")
    load_start(replace(recipe, model=plain, start=Parts(decoder=whole)), back)
    assert all(torch.equal(value, words.decoder.state_dict()[k]) for k, value in back.decoder.state_dict().items())
    load_start(replace(inside, start=Parts(fusion=whole)), again)
    theirs, own_words = model.state_dict(), {f"decoder.{k}" for k in Decoder(plain.decoder).state_dict()}
    apart = [k for k in theirs if ("cross" in k or "vision" in k or k.startswith("fusion.")) and k not in own_words]
    assert apart and all(torch.equal(again.state_dict()[k], theirs[k]) for k in apart)


def test_new_words_begin_as_the_mean_of_all() -> None:
    table = torch.randn(5, 3)
    assert torch.equal(grown(table, 5), table) and torch.equal(grown(table, 3), table[:3])
    assert torch.equal(grown(table, 7)[:5], table)
    assert torch.allclose(grown(table, 7)[5:], table.mean(0).expand(2, 3))


def test_positions_are_resized_and_lose_the_class_token_s() -> None:
    cfg = ViTConfig(image_size=32, patch_size=8, width=8, depth=1, heads=2, mlp=8, class_token=True)
    encoder = ViT(cfg)
    assert encoder.positions is not None
    assert torch.equal(resized(encoder, cfg), encoder.positions)  # type: ignore[arg-type]
    bare = replace(cfg, class_token=False, final_norm=False)
    assert torch.equal(resized(encoder, bare), encoder.positions[1:])  # type: ignore[arg-type]
    larger = resized(encoder, replace(bare, position_grid=6))
    wanted = encoder.position_table((1, 6, 6))
    assert larger is not None and wanted is not None and torch.equal(larger, wanted[1:])
    assert contradiction(bare, cfg) == ""  # what there is too much of is left out
    assert contradiction(cfg, bare) == "class_token is False, expected True"
