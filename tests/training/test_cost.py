"""What a sample costs: tokens, operations, kept numbers: by hand on a model of one block, or as a real pass has it."""

import json
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from torch import nn

from sightline.core.layout import Medium, causal_layout
from sightline.core.patches import Patches
from sightline.data.batch import Batch
from sightline.data.images import Square
from sightline.data.tiles import Tiles
from sightline.fusion.qformer import QFormerConfig
from sightline.model import VLM
from sightline.recipes import sightline_mini
from sightline.training.adapters import Learning, Lora, adapt
from sightline.training.cost import Cost, Tape, Usual, cost, machine_memory, matmul_rate, usual
from sightline.training.objectives import features_of
from sightline.training.recipe import Recipe, freeze, learning_rates
from sightline.training.representation import Representation
from sightline.training.run import processor_of
from sightline.training.settings import RepresentationConfig
from sightline.training.sources import FilesSource, opened
from sightline.zoo import own
from sightline.zoo.hollow import hollow
from sightline.zoo.names import locate

TEXT, SEEN = 6, 4  # tokens of text and of a picture of 2x2 patches
ALL = TEXT + SEEN
# by hand, twice the multiplications: widths 16 and 24, 2 heads, feed-forwards of 32 and 48, 480 words
ENCODER = 2 * SEEN * (3 * 16 * 16 * 16 + 4 * 16 * 16 + 2 * 16 * 32) + 2 * SEEN * SEEN * 2 * 16
FIRST, SECOND = 2 * SEEN * 16 * 24, 2 * SEEN * 24 * 24  # of the projector
QKV, OUT, MLP = 2 * ALL * 3 * 24 * 24, 2 * TEXT * 24 * 24, 2 * TEXT * 3 * 24 * 48
ATTENTION, HEAD = 2 * ALL * ALL * 2 * 24, 2 * TEXT * 24 * 480
FORWARD = ENCODER + FIRST + SECOND + QKV + OUT + MLP + ATTENTION + HEAD


def asking(recipe: Recipe, learn: Learning, device: str = "meta") -> VLM:
    """A model of the recipe whose parameters ask for gradients as the stage would have it."""
    if device == "meta":
        with hollow():
            model = VLM(recipe.model)
            adapt(model, learn)
    else:
        model = VLM(recipe.model)
        adapt(model, learn)
    freeze(model, learning_rates(model, learn))
    return model


def test_a_projector_alone_has_gradients_of_the_decoder_but_none_of_its_weights(recipe: Recipe) -> None:
    found = cost(asking(recipe, {"fusion.*": 1e-3}), Usual(1, TEXT))
    assert (found.visual, found.text, found.tokens) == (SEEN, TEXT, ALL)
    assert found.forward == FORWARD
    assert found.backward == FIRST + 2 * SECOND + QKV + OUT + MLP + 2 * ATTENTION + HEAD


def test_what_learns_in_full_has_twice_the_forward_pass(recipe: Recipe) -> None:
    found = cost(asking(recipe, {"decoder.*": 1e-3}), Usual(1, TEXT))
    assert found.backward == 2 * (QKV + OUT + MLP + ATTENTION + HEAD)
    assert found.forward == FORWARD


def test_adapters_have_products_of_their_own_and_none_of_the_weights(recipe: Recipe) -> None:
    rank = 3
    found = cost(asking(recipe, {"decoder.blocks.*": Lora(rank)}), Usual(1, TEXT))
    into, back = 2 * ALL * 3 * 24 * rank, 2 * ALL * 3 * rank * 24  # of queries, keys and values
    later = 2 * TEXT * (24 + 24) * rank + 2 * TEXT * 3 * (24 + 48) * rank  # of the output and the feed-forward
    assert found.forward == FORWARD + into + back + later
    # nothing before the first block learns, so that its inputs have no gradients
    assert found.backward == into + 2 * back + 2 * later + OUT + MLP + 2 * ATTENTION + HEAD


def test_text_alone_and_pictures_alone(recipe: Recipe) -> None:
    model = asking(recipe, {"fusion.*": 1e-3})
    text = cost(model, Usual(0, TEXT))
    assert (text.visual, text.backward) == (0, 0)
    pictures = cost(model, Usual(1, 0), reads=False)
    assert pictures.forward == ENCODER + FIRST + SECOND
    assert pictures.backward == FIRST + 2 * SECOND
    assert pictures.kept == SEEN * (16 + 24 + 24)  # what the maps and the activation between them read
    assert cost(asking(recipe, {"encoder.*": 1e-3}), Usual(1, 0), reads=False).forward == ENCODER


@pytest.mark.parametrize(
    "learn",
    [{"fusion.*": 1e-3}, {"*": 1e-3}, {"decoder.*": Lora(2)}, {"decoder.*": Lora(2, dora=True), "fusion.*": 1e-3}],
)
def test_what_is_kept_is_what_a_real_pass_keeps(recipe: Recipe, learn: Learning) -> None:
    measured = cost(asking(recipe, learn), Usual(1, TEXT))
    model = asking(recipe, learn, "cpu")
    layout = causal_layout(1, ALL)
    carried = torch.tensor([[Medium.IMAGE] * SEEN + [Medium.TEXT] * TEXT])
    patches = Patches(torch.rand(SEEN, 768), ((1, 2, 2),))
    prompt = Batch(torch.zeros(1, ALL, dtype=torch.int64), replace(layout, medium=carried), torch.arange(SEEN), patches)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        scores = model.logits(model(prompt, rows=torch.arange(SEEN, ALL)))
        torch.nn.functional.cross_entropy(scores, torch.zeros(TEXT, dtype=torch.int64))
    real = sum(x.untyped_storage().nbytes() for x in kept.values())
    assert measured.memory(1, "fp32") == pytest.approx(real, rel=0.02)


def test_memory_grows_with_the_samples_and_copies_of_weights_do_not() -> None:
    found = Cost(kept=10, copied=7, joined=3)
    assert found.memory(1, "fp32") == 4 * (10 + 3)
    assert found.memory(5, "fp32") == 4 * (50 + 3)
    assert found.memory(5, "bf16") == 2 * (50 + 7)


def test_copies_are_of_weights_whose_inputs_have_gradients(recipe: Recipe) -> None:
    found = cost(asking(recipe, {"fusion.*": 1e-3}), Usual(1, TEXT))
    assert found.joined == 3 * 24 * 24 + 2 * 24 * 48
    assert found.copied == 24 * 24 + found.joined + 24 * 24 + 24 * 48 + 24 * 480


def test_a_tape_leaves_the_model_as_it_was(recipe: Recipe) -> None:
    model = asking(recipe, {"*": 1e-3}, "cpu")
    with Tape(model) as tape:
        model.decoder.embed(torch.zeros(1, 2, dtype=torch.int64))
    assert (tape.count, tape.backward) == (0, 0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["text", "things", "places", "numbers", "questions"])
def test_a_usual_sample_is_about_as_long_as_it_is(name: str) -> None:
    recipe = sightline_mini()
    folder = locate("sightline-mini")
    model = own.load_model(folder)
    processor = processor_of(recipe, own.load_processor(folder, model).tokenizer, model)
    source = recipe.sources[name]
    lengths = [processor.branches(source(0, 0, source.grown + k).conversation).length for k in range(4)]
    found = usual(source)
    assert found.pictures == (name != "text") and not found.guess
    assert found.text + 64 * found.pictures == pytest.approx(sum(lengths) / 4, rel=0.25)


def test_files_that_are_not_here_are_a_guess() -> None:
    source = FilesSource(kind="conversations", format="llava", text=40)
    assert usual(source) == usual(source, Square(32)) == Usual(1, 40, guess=True)
    assert usual(source, Tiles(32)) == Usual(13, 40, guess=True)  # 4 x 3 tiles and the whole


def test_tiles_of_real_pictures_are_counted(tmp_path: Path) -> None:
    rows = []
    for name, size in (("wide", (64, 32)), ("square", (32, 32))):
        PIL.Image.new("RGB", size).save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
        rows.append({"image": f"{name}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = FilesSource(kind="conversations", format="llava", path=str(tmp_path / "rows.json"))
    assert usual(source, Tiles(32, max_tiles=2)).pictures == 2  # three views and one
    assert usual(source).pictures == 1


def test_a_q_former_s_first_stage_reads_three_pairs_for_each(recipe: Recipe) -> None:
    """What is counted is what a real step multiplies: both by themselves, words from queries, and three pairs."""
    fusion = QFormerConfig(inputs=16, width=24, queries=3, hidden=8, depth=2, heads=2, mlp=16)
    model = VLM(replace(recipe.model, fusion=fusion))
    taught = Representation(model, 480, 0, RepresentationConfig(projection=6, max_length=24))
    freeze(model, learning_rates(model, {"fusion.layers.*": 1.0, "fusion.queries": 1.0}))
    captions = torch.randint(1, 400, (2, 7))
    image = recipe.model.image
    grids = ((1, image.grid, image.grid),) * 2
    patches = Patches(torch.rand(2 * image.grid**2, image.patch_dim), grids)
    none = torch.zeros(2, 0, dtype=torch.int64)
    batch = Batch(none, causal_layout(2, 0), none[0], patches, extra={"captions": captions})
    with Tape(nn.ModuleList((model, taught))) as real:
        taught(model, batch)
    with torch.device("meta"):
        hollow = VLM(model.config)
        other = Representation(hollow, 480, 0, RepresentationConfig(projection=6, max_length=24))
    freeze(hollow, learning_rates(hollow, {"fusion.layers.*": 1.0, "fusion.queries": 1.0}))
    found = cost(hollow, Usual(1, 7), reads=False, taught=other)
    assert found.forward == pytest.approx(real.count / 2, rel=0.02)
    assert found.backward == pytest.approx(real.backward / 2, rel=0.02)
    with Tape(nn.ModuleList((model, taught))) as one:
        taught.rehearse(
            model.fusion,
            features_of(model, replace(batch, patches=Patches(patches.values[: image.grid**2], grids[:1]))),
            7,
        )
    assert one.kept == pytest.approx(real.kept / 2, rel=0.02)


@pytest.mark.parametrize("good, found", [(1, Usual(0, 8)), (0, Usual(1, 256, guess=True))])
def test_samples_that_cannot_be_used_are_not_usual(tmp_path: Path, good: int, found: Usual) -> None:
    """A plan and the bar of a run look at some samples, of which the run would pass over most."""
    talk = [{"from": "human", "value": "which one?"}, {"from": "gpt", "value": "this"}]
    rows = [{"conversations": talk}] * good + [{"image": "none.png", "conversations": talk}] * 9
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert usual(FilesSource(kind="conversations", format="llava", path=str(tmp_path / "rows.json"))) == found


def test_rows_that_cannot_be_used_are_not_usual(tmp_path: Path) -> None:
    def row(image: str) -> dict[str, object]:
        turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "red"}]
        return {"image": image, "conversations": turns}

    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "red.png")
    path = tmp_path / "rows.json"
    source = FilesSource(kind="conversations", format="llava", path=str(path))
    path.write_text(json.dumps([row("red.png"), row("none.png"), row("red.png")]))
    assert usual(source) == Usual(1, 7)
    path.write_text(json.dumps([row("none.png")]))
    opened.cache_clear()
    assert usual(source).guess


def test_the_rate_is_that_of_a_product() -> None:
    assert 1e8 < matmul_rate("fp32", seconds=0.0, side=256) < 1e15


def test_the_machine_has_more_memory_than_this_process_takes() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    assert taken < machine_memory() < 1 << 50
