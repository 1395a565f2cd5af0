"""What `show` tells, held against the real thing: parameters against modules, operations against torch's counter."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sightline.core.errors import ConfigError, InputError
from sightline.core.layout import causal_layout
from sightline.core.patches import Patches
from sightline.data.batch import Batch
from sightline.fusion.projector import ProjectorConfig
from sightline.model import VLM, VLMConfig
from sightline.zoo import own
from sightline.zoo.describe import QUESTION, describe
from sightline.zoo.families import ROWS, kind_of
from sightline.zoo.hollow import hollow
from sightline.zoo.names import DEFAULT, describe_named, locate
from sightline.zoo.numbers import short


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> VLMConfig:
    return own.read_card(tiny_folder).model


def test_parameters_are_those_of_the_model(config: VLMConfig) -> None:
    model = VLM(config)
    told = describe("tiny", config, {"align": ("fusion.*",), "all": ("*",)})
    assert told.parameters["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    assert told.parameters["fusion"] == sum(p.numel() for p in model.fusion.parameters())
    assert told.trained == {"align": told.parameters["fusion"], "all": sum(p.numel() for p in model.parameters())}
    assert told.memory["bf16"] == 2 * sum(p.numel() for p in model.parameters())


def test_operations_agree_with_torch(config: VLMConfig) -> None:
    """On real numbers; attention step by step, because the counter does not know the CPU's fused kernel."""
    model, visual = VLM(config).eval(), config.image.grid**2
    told = describe("tiny", config)
    with sdpa_kernel(SDPBackend.MATH):
        expected = count_with_torch(model, visual)
    assert list(told.flops.values()) == expected


def count_with_torch(model: VLM, visual: int) -> list[int]:
    """Operations to see a picture, to read a prompt, to write a token."""
    with torch.no_grad(), FlopCounterMode(display=False) as seeing:
        bridge = model.see(Patches(torch.randn(visual, model.config.image.patch_dim), ((1, 4, 4),)))
    length = visual + QUESTION
    prompt = Batch(torch.zeros(1, length, dtype=torch.int64), causal_layout(1, length), torch.arange(visual))
    cache = model.new_cache()
    with torch.no_grad(), FlopCounterMode(display=False) as reading:
        model.logits(model(prompt, cache, bridge)[:, -1:])
    assert cache.layout is not None
    step = Batch(torch.zeros(1, 1, dtype=torch.int64), cache.layout.next(), torch.zeros(0, dtype=torch.int64))
    with torch.no_grad(), FlopCounterMode(display=False) as writing:
        model.logits(model(step, cache))
    return [counter.get_total_flops() for counter in (seeing, reading, writing)]


def test_keys_and_values_are_those_of_the_cache(config: VLMConfig) -> None:
    model = VLM(config).eval().bfloat16()
    cache = model.new_cache()
    with torch.no_grad():
        model(
            Batch(torch.zeros(1, 1, dtype=torch.int64), causal_layout(1, 1), torch.zeros(0, dtype=torch.int64)), cache
        )
    held = sum(t.nbytes for layer in cache.layers for t in (layer.key, layer.value) if t is not None)
    assert describe("tiny", config).cache == held


def test_the_pipeline_has_the_shapes_of_a_pass(config: VLMConfig) -> None:
    folded = VLMConfig(config.image, ProjectorConfig(inputs=32, width=32, shuffle=2), config.decoder)
    stations = {station.name: station for station in describe("tiny", folded).pipeline}
    assert stations["picture"].shape == (3, 64, 64)
    assert stations["patches"].shape == (16, 768)
    assert stations["fusion"].shape == (4, 32)
    assert stations["sequence"].shape == (4 + QUESTION, 32)
    assert stations["next token"].shape == (config.decoder.vocab_size,)
    assert "2x2 patches folded" in stations["fusion"].note


def test_published_sizes_are_the_published_ones() -> None:
    """LLaMA-2 7B has 6,738,415,616 parameters with 32,000 words; LLaVA adds 64 words to both ends."""
    told = describe_named("llava-1.5-7b")
    assert told.parameters["decoder"] == 6_738_415_616 + 2 * 64 * 4096
    assert told.parameters["fusion"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert told.visual_tokens == 576
    assert told.trained["align"] == told.parameters["fusion"]
    assert describe_named("paligemma-3b-pt-448").visual_tokens == 1024


def test_the_sizes_of_models_that_look_at_pictures() -> None:
    """IDEFICS' 9 and 80 billion parameters, of which pretraining teaches what is between the two published models."""
    told = describe_named("idefics-9b-instruct")
    cross = 8 * (2 * 4096**2 + 2 * 1280 * 4096 + 3 * 4096 * 11008 + 2 * 4096 + 2 * 128 + 2)
    assert told.parameters["decoder"] == 6_738_415_616 + cross + 2 * 3 * 4096
    assert told.trained["pretrain"] == told.parameters["fusion"] + cross + 2 * 3 * 4096
    assert sum(told.parameters.values()) == pytest.approx(8.93e9, rel=0.005)
    assert sum(describe_named("idefics-80b-instruct").parameters.values()) == pytest.approx(80e9, rel=0.005)


def test_the_sizes_of_internvl() -> None:
    """25.5 billion parameters with InternLM2, of which 5.54 see and 19.86 write; 938 million in the small one."""
    told = describe_named("internvl-chat-v1-5")
    assert told.visual_tokens == 256  # of one tile
    assert told.parameters["encoder"] == pytest.approx(5.54e9, abs=5e6)
    assert told.parameters["decoder"] == pytest.approx(19.86e9, abs=5e6)
    assert told.parameters["fusion"] == 2 * 12_800 + 12_800 * 6144 + 6144**2 + 2 * 6144
    assert sum(told.parameters.values()) == pytest.approx(25.5e9, abs=50e6)
    assert sum(describe_named("internvl3-1b-hf").parameters.values()) == pytest.approx(938e6, abs=0.5e6)


def test_the_sizes_of_kosmos_2() -> None:
    """1.3 billion parameters in the language model, 1.6 billion in all (arXiv:2302.14045, section 3.2)."""
    told = describe_named("kosmos-2-patch14-224")
    assert told.parameters["decoder"] == pytest.approx(1.3e9, rel=0.04)
    assert sum(told.parameters.values()) == 1_664_485_376  # as transformers builds it
    assert told.visual_tokens == 64
    assert told.trained["pretrain"] == sum(told.parameters.values()) - told.parameters["encoder"] + 12_596_224


def test_the_sizes_of_aria() -> None:
    """24.9 billion parameters in the language model (arXiv:2410.05993), 25.3 billion in all (its model card)."""
    told = describe_named("aria")
    assert told.parameters["decoder"] == pytest.approx(24.9e9, rel=0.005)
    assert sum(told.parameters.values()) == pytest.approx(25.3e9, rel=0.005)
    assert told.visual_tokens == 256


@pytest.mark.parametrize(
    ("name", "size", "views", "tokens", "around"),
    [
        ("llava-1.5-7b", (1344, 896), 1, 576, 0),
        ("llava-1.6-mistral-7b", (1344, 896), 5, 576 + 32 * 49, 0),
        ("internvl-chat-v1-5", (1344, 896), 7, 7 * 256, 2),  # 3x2 tiles and the whole, between two tokens
        ("internvl-chat-v1-5", (448, 448), 1, 256, 2),
        ("qwen-vl", (1344, 896), 1, 256, 2),
        ("paligemma-3b-pt-448", (30, 3000), 1, 1024, 0),
    ],
)
def test_a_picture_of_any_size(name: str, size: tuple[int, int], views: int, tokens: int, around: int) -> None:
    """LLaVA-NeXT: 48x48 patches less the 8 rows above and below that are padding, a token a row; then the whole."""
    told = describe_named(name, size)
    picture, patches, *_, sequence, _, _ = told.pipeline
    assert picture.shape == (3, size[1], size[0])
    assert patches.note.startswith(f"{views} view")
    assert (
        told.visual_tokens == tokens == 576 + 32 * 49 if name.startswith("llava-v1.6") else told.visual_tokens == tokens
    )
    assert sequence.shape[0] == tokens + around + QUESTION
    assert (f", {around} control and" in sequence.note) == bool(around)
    assert list(told.flops)[1] == f"to read {tokens + around + QUESTION} tokens"
    if views > 1:
        whole = describe_named(name)
        assert told.flops["to see a picture"] == pytest.approx(views * whole.flops["to see a picture"], rel=0.05)


@pytest.mark.parametrize("name", ROWS)
def test_every_published_model_tells_how_it_sees(name: str) -> None:
    if not kind_of(ROWS[name]):
        with pytest.raises(ConfigError, match=f"how {name} prepares pictures is not known here"):
            describe_named(name, (640, 480))
        return
    told = describe_named(name, (640, 480))
    assert told.visual_tokens > 0 and told.pipeline[0].shape == (3, 480, 640)


def test_our_own_models_see_a_picture_of_any_size_as_they_do(tiny_folder: Path) -> None:
    told = describe_named(tiny_folder, (100, 30))
    assert told.visual_tokens == 16 and told.pipeline[1].note == "1 view: 1 of 64x64"
    for size in ((0, 5), (100_000, 100_000)):
        with pytest.raises(InputError, match=f"a picture of {size[0]}x{size[1]} pixels"):
            describe_named(tiny_folder, size)


def test_34_billion_parameters_are_described_in_under_two_seconds() -> None:
    """Every block of a kind is run once, and nothing waits for torch's compiler; a program waits for torch as well."""
    start = time.perf_counter()
    told = describe_named("llava-1.6-34b", (1344, 896))
    assert time.perf_counter() - start < 2
    assert sum(told.parameters.values()) == pytest.approx(34.8e9, rel=0.002)


def test_lines_say_what_the_numbers_say(config: VLMConfig) -> None:
    told = describe("tiny", config, {"align": ("fusion.*",)})
    text = "\n".join(told.lines())
    assert "1 visual token a picture" in replace(told, visual_tokens=1).lines()[0]
    for part in ("tiny: ", "16 visual tokens", "align", "encoder", f"{short(told.memory['bf16'], 'B')} bf16"):
        assert part in text
    assert told.to_dict()["pipeline"][0] == {"name": "picture", "shape": [3, 64, 64], "note": ""}


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (65_200, "65.2 k"), (7.06e9, "7.06 G"), (304e6, "304 M")],
)
def test_short_numbers(count: float, told: str) -> None:
    assert short(count) == told


def test_a_hollow_model_takes_no_memory_and_no_compiler() -> None:
    described_without_compiler("llava-1.6-34b", "paligemma2-3b-pt-224", "blip2-flan-t5-xl", "gemini-1.5-like")


@pytest.mark.slow
def test_no_model_takes_the_compiler() -> None:
    described_without_compiler(*ROWS)


def described_without_compiler(*names: str) -> None:
    """In a new process, which has imported nothing yet."""
    code = f"""
import sys
from sightline.zoo.names import describe_named
for name in {names}:
    told = describe_named(name)
    assert sum(told.parameters.values()) > 1e8, name
    late = {{"torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"}} & set(sys.modules)
    assert not late, f"{{name}} imported {{late}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shapes_without_content_are_those_of_content() -> None:
    """Of every function that is done to zeros, or not at all, as torch itself finds them."""
    x, y, rows = torch.rand(2, 3, 4), torch.rand(3, 4), torch.tensor([0, 2])

    def found(x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        picture, weight = x[:, None].expand(2, 3, 3, 4), y.new_zeros(5, 3, 2, 2)
        made = [x + y, x * y, x * 2, -x, x.cos(), 2.0**-y, x == y, ~(x > y), torch.cat((x, x), -1), torch.stack([x, x])]
        made += [x @ y.T, torch.matmul(x, y.T), x.topk(2, dim=1)[1], x.softmax(-1), x.sum((0, 1)), x.argsort()]
        made += [rows[:, None] * rows, rows / 2, rows.float(), x[rows - 1], rows.repeat(3), torch.where(x > 0, x, 0.0)]
        made += [F.conv2d(picture, weight, None, 2, 1), F.interpolate(picture, size=(7, 5)), F.embedding(rows, y)]
        made += [rows * 2.5, -rows, x.sigmoid(), torch.sigmoid(x), torch.cat((x, x), dim=1), torch.cat((rows, y[0]))]
        return [*made, torch.arange(3, 9, 2), x.index_copy(1, rows, x[:, rows])]

    with torch.no_grad():
        expected = found(x, y, rows)
        with hollow():
            told = found(*(torch.empty(each.shape, dtype=each.dtype) for each in (x, y, rows)))
    assert [(each.shape, each.dtype) for each in told] == [(each.shape, each.dtype) for each in expected]
    assert all(each.is_meta for each in told)


def test_tensors_with_content_are_filled_while_it_is_on() -> None:
    with hollow():
        assert torch.ones(3, device="cpu").zero_().tolist() == [0.0, 0.0, 0.0]


def test_after_it_tensors_are_real_again() -> None:
    with hollow():
        assert torch.nn.Linear(2, 2).weight.is_meta
    weight = torch.nn.init.normal_(torch.zeros(100))
    assert not weight.is_meta
    assert float(weight.std()) > 0.5


def test_folders_and_names_lead_to_models(tiny_folder: Path, tmp_path: Path) -> None:
    assert locate(tiny_folder) == tiny_folder
    assert describe_named(tiny_folder).name == "tiny"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llava-1.5-7c", "no model and no folder 'llava-1.5-7c'; did you mean 'llava-1.5-7b'"),
        ("sightline-mimi", f"did you mean '{DEFAULT}'"),
        ("llava-1.5-7b", "not here; give the folder that holds llava-hf/llava-1.5-7b-hf"),
    ],
)
def test_unknown_and_absent_models_are_told(name: str, message: str) -> None:
    from sightline import SightlineError

    with pytest.raises(SightlineError, match=message):
        locate(name)
