"""Runs that begin from CLIP and a LLaMA as transformers writes them, each in a folder of its own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers as hf
from torch import Tensor

from sightline.core.errors import ConfigError
from sightline.core.sequence import Image, Message, Text
from sightline.data.images import PadSquare
from sightline.language.tokenizer import Tokenizer, train_tokenizer
from sightline.model import VLM
from sightline.recipes import recipe
from sightline.training import checkpoints
from sightline.training.export import export
from sightline.training.recipe import Parts, Recipe
from sightline.training.run import run, tokenizer_of
from sightline.training.sources import FilesSource
from sightline.zoo import own
from sightline.zoo.families import FAMILIES, ROWS
from sightline.zoo.published import load_published

from .published_folders import TEXT, VISION, randomised, saved

CONTROLS = ("<unk>", "<s>", "</s>")
WORDS = 300  # of the language model; its tokenizer has fewer


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """CLIP with its text half, as it is published."""
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.CLIPConfig(text_config={**text, "vocab_size": 20}, vision_config=VISION, projection_dim=8)
    model = randomised(hf.CLIPModel(config), 1)
    return model, saved(model, tmp_path_factory.mktemp("parts") / "clip")


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A LLaMA with a tokenizer that knows nothing of pictures."""
    model = randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, "vocab_size": WORDS})), 2)
    folder = saved(model, tmp_path_factory.mktemp("parts") / "llama")
    train_tokenizer(["which one is it? red"] * 30, 290, CONTROLS, bos="<s>", eos="</s>", unk="<unk>").save(folder)
    return model, folder


@pytest.fixture
def chosen(tower: tuple[Any, Path], language: tuple[Any, Path], tmp_path: Path) -> Recipe:
    """LLaVA-1.5's recipe for a small model, both stages two steps long."""
    rows = []
    for color in ("red", "blue"):
        PIL.Image.new("RGB", (60, 40), color).save(tmp_path / f"{color}.png")
        turns = [{"from": "human", "value": "<image>\nwhich one is it?"}, {"from": "gpt", "value": color}]
        rows.append({"image": f"{color}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = FilesSource(kind="conversations", format="llava", path=str(tmp_path / "rows.json"))
    published, c = recipe("llava-1.5-7b"), {"vision_config": VISION, "text_config": {**TEXT, "vocab_size": 320}}
    cut = {"steps": 2, "batch": 2, "accumulate": 1, "warmup": 0, "precision": "fp32", "save_every": 1}
    return replace(
        published,
        model=ROWS["llava-1.5-7b"].read(c),
        pixels=PadSquare(28),
        sources=dict.fromkeys(published.sources, source),
        stages=tuple(replace(stage, **cut) for stage in published.stages),  # type: ignore[arg-type]
        start=Parts(str(tower[1]), decoder=str(language[1])),
    )


def kept(folder: Path, stage: str) -> dict[str, Tensor]:
    found = checkpoints.newest(folder / "checkpoints" / stage, print)
    assert found is not None
    return found.tensors["model"]


def test_align_begins_from_both_and_leaves_them_as_they_are(
    chosen: Recipe, tower: tuple[Any, Path], language: tuple[Any, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert [step.step for step in run(chosen, folder, "align", workers=0)] == [1, 2]
    weights, model = kept(folder, "align"), VLM(chosen.model)
    ours = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    clip = FAMILIES["clip"].keys(chosen.model.image).save(ours)
    theirs = tower[0].vision_model.state_dict()
    assert len(clip) == len([name for name in theirs if not name.endswith("position_ids")])
    for name, value in clip.items():
        assert torch.equal(value, theirs[name.removeprefix("vision_model.")]), name
    ours = {k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")}
    llama, theirs = FAMILIES["llama"].keys(chosen.model.decoder).save(ours), language[0].state_dict()
    assert set(llama) == set(theirs)
    for name, value in llama.items():
        assert torch.equal(value[: len(theirs[name])], theirs[name]), name
        if len(value) > len(theirs[name]):  # rows of words that the tokenizer gains
            assert torch.allclose(value[len(theirs[name]) :], theirs[name].mean(0), atol=1e-6), name
    drawn = {name: value for name, value in model.state_dict().items() if name.startswith("fusion.")}
    assert not any(torch.equal(weights[name], value) for name, value in drawn.items())


def test_its_tokenizer_is_the_language_model_s_with_tokens_for_pictures(
    chosen: Recipe, language: tuple[Any, Path], tmp_path: Path
) -> None:
    before, after = Tokenizer.from_folder(language[1]), tokenizer_of(chosen, tmp_path)
    assert after.encode("which one is red?") == before.encode("which one is red?")
    assert [after.control(name) for name in ("<image>", "<pad>")] == [before.following, before.following + 1]
    assert (after.bos, after.eos, after.pad) == ("<s>", "</s>", "<pad>")
    again = tokenizer_of(chosen, tmp_path)
    assert again.controls == after.controls and again.pad == "<pad>"
    few = replace(chosen.model, decoder=replace(chosen.model.decoder, vocab_size=before.following))
    with pytest.raises(ConfigError, match=r"a tokenizer of \d+ ids, the decoder of 'llava-1.5-7b' has \d+"):
        tokenizer_of(replace(chosen, model=few), tmp_path / "few")


def test_a_run_goes_on_and_its_model_answers(chosen: Recipe, tmp_path: Path) -> None:
    """Stopped within a stage and between two, it gives the same weights as in one go; what is exported is asked."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert len(list(run(chosen, whole, workers=0))) == 4
    for stopped in (1, 2):
        steps = run(chosen, parts, workers=0)
        for _ in range(stopped):
            next(steps)
        steps.close()
    list(run(chosen, parts, workers=0))
    for stage in ("align", "instruct"):
        a, b = kept(whole, stage), kept(parts, stage)
        assert all(torch.equal(a[name], b[name]) for name in a)
    model, processor = own.load(export(chosen, parts, tmp_path / "model"))
    talk = (
        Message("user", (Image(PIL.Image.open(tmp_path / "red.png").convert("RGB"), "red"), Text("which one is it?"))),
    )
    assert isinstance(model.model, VLM)
    example = processor(talk)
    assert (example.ids == processor.image_id).sum() == 16
    assert processor.tokenizer.eos == "</s>"


# ------------------------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("encoder", {"width": 64, "heads": 4}, r"clip: its encoder is not that of recipe .*: width is 32, expected 64"),
        ("encoder", {"depth": 4}, "depth is 3, expected 4"),
        ("encoder", {"patch_size": 14}, "patch_size is 7, expected 14"),
        ("decoder", {"mlp": 64}, r"llama: its decoder is not that of recipe .*: mlp is 48, expected 64"),
        ("decoder", {"kv_heads": 4}, "kv_heads is 2, expected 4"),
        ("decoder", {"qkv_bias": True}, "qkv_bias is False, expected True"),
        ("decoder", {"eps": 1e-5}, "eps is 1e-06, expected 1e-05"),
    ],
)
def test_a_part_of_another_design_is_one_clear_line(
    chosen: Recipe, tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    fields = {"encoder": "image", "decoder": "decoder"}
    model = replace(chosen.model, **{fields[part]: replace(getattr(chosen.model, fields[part]), **change)})
    if "width" in change:
        model = replace(model, fusion=replace(model.fusion, inputs=change["width"]))
    with pytest.raises(ConfigError, match=message) as told:
        next(run(replace(chosen, model=model), tmp_path / "run", workers=0))
    assert len(str(told.value).splitlines()) == 1


def test_parts_in_each_other_s_place_are_told(chosen: Recipe, tmp_path: Path) -> None:
    assert isinstance(chosen.start, Parts)
    swapped = Parts(chosen.start.decoder, decoder=chosen.start.decoder)
    with pytest.raises(ConfigError, match=r"llama: no encoder in it, expected a folder of one or of a whole model"):
        next(run(replace(chosen, start=swapped), tmp_path / "run", workers=0))


def test_pictures_of_another_size_and_an_earlier_layer_are_no_contradiction(
    chosen: Recipe, tower: tuple[Any, Path], tmp_path: Path
) -> None:
    """The table of positions is resized, as transformers does it where it is asked to."""
    image = replace(chosen.model.image, image_size=42, layer=-1)
    larger = replace(chosen, model=replace(chosen.model, image=image), pixels=PadSquare(42))
    list(run(larger, tmp_path / "run", "align", workers=0))
    found = kept(tmp_path / "run", "align")["encoder.positions"]
    wanted = tower[0].vision_model.embeddings.interpolate_pos_encoding(torch.zeros(1, 37, 32), 42, 42)[0]
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.fixture
def whole_folder(tmp_path: Path) -> Callable[..., Path]:
    """whole_folder(**sizes): a published LLaVA of such sizes, with a tokenizer."""

    def make(**sizes: Any) -> Path:
        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=hf.LlamaConfig(**{**TEXT, "vocab_size": 320, **sizes}),
            image_token_index=300,
        )
        folder = saved(randomised(hf.LlavaForConditionalGeneration(config), 4), tmp_path / "llava-hf")
        train_tokenizer(["red"] * 30, 290, (*CONTROLS, "<image>", "<pad>"), bos="<s>", eos="</s>").save(folder)
        return folder

    return make


def test_a_whole_published_folder_may_be_gone_on_from(
    chosen: Recipe, whole_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """At whichever stage is trained first; parts may be taken of it as well."""
    folder = whole_folder()
    list(run(replace(chosen, start=str(folder)), tmp_path / "later", "instruct", workers=0))
    weights, theirs = kept(tmp_path / "later", "instruct"), load_published(folder).model.state_dict()
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs if name.startswith("encoder."))
    parts = Parts(str(folder), str(folder), str(folder))
    list(run(replace(chosen, start=parts), tmp_path / "parts", "align", workers=0))
    weights = kept(tmp_path / "parts", "align")
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs if not name.startswith("fusion."))
    assert all((weights[name] - theirs[name]).abs().max() < 0.01 for name in theirs if name.startswith("fusion."))


def test_a_whole_folder_of_another_design_is_refused(
    chosen: Recipe, whole_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = whole_folder(intermediate_size=56)
    with pytest.raises(
        ConfigError, match=r"of another design than recipe 'llava-1.5-7b' \(decoder: mlp is 56, expected 48\)"
    ):
        next(run(replace(chosen, start=str(folder)), tmp_path / "run", "instruct", workers=0))
