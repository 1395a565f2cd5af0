"""Converting without transformers: what is refused, what is kept, and that a folder is written whole or not at all."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sightline.core.errors import ConfigError, InputError
from sightline.encoders.vit import ViTConfig
from sightline.fusion.glu import GLUConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.language.decoder import DecoderConfig
from sightline.layers.rotary import RopeScaling
from sightline.layers.scores import Scores
from sightline.model import VLM, VLMConfig
from sightline.zoo import own
from sightline.zoo.convert import convert, exact
from sightline.zoo.llava_settings import equivalent, fitted

FITS = VLMConfig(
    ViTConfig(image_size=64, patch_size=16, width=32, depth=2, heads=2, mlp=64, normed=False),
    ProjectorConfig(inputs=32, width=32),
    DecoderConfig(vocab_size=600, width=32, depth=2, heads=2, mlp=64, tied=True, qk_norm=True, max_length=256),
)


@pytest.fixture
def fitting(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder of ours that LLaVA's layout has a place for."""
    model = own.load_model(tiny_folder)
    processor = own.load_processor(tiny_folder, model)
    cfg = replace(FITS, decoder=replace(FITS.decoder, vocab_size=model.config.decoder.vocab_size))
    own.save(VLM(cfg), processor.tokenizer, own.ProcessorConfig(processor.pixels), tmp_path / "fits")  # type: ignore[arg-type]
    return tmp_path / "fits"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": replace(FITS.image, stem=(8, 16))}, r"image.stem is \(8, 16\), expected \(\)$"),
        ({"image": replace(FITS.image, normed=True)}, "image.normed is True, expected False$"),
        ({"image": replace(FITS.image, registers=2)}, "image.registers is 2, expected 0$"),
        ({"image": replace(FITS.image, layer_scale=True)}, "image.layer_scale is True, expected False$"),
        ({"fusion": replace(FITS.fusion, hidden=48)}, "fusion.hidden is 48, expected 32$"),
        ({"fusion": replace(FITS.fusion, shuffle=2)}, "fusion.shuffle is 2, expected 1$"),
        ({"fusion": replace(FITS.fusion, layers=3)}, "fusion.layers is 3, expected 2"),
        ({"fusion": GLUConfig(inputs=32, width=32, hidden=24)}, "fusion is 'glu', expected 'projector'$"),
        ({"decoder": replace(FITS.decoder, norm_at="both")}, "decoder.norm_at is 'both', expected 'before'$"),
        ({"decoder": replace(FITS.decoder, positions="none")}, "decoder.positions is 'none', expected 'rotary'$"),
        ({"decoder": replace(FITS.decoder, logit_softcap=9.0)}, "decoder.logit_softcap is 9.0, expected None$"),
        (
            {"decoder": replace(FITS.decoder, scores=Scores(alibi=True))},
            "decoder.scores.alibi is True, expected False$",
        ),
        ({"decoder": replace(FITS.decoder, rotary_fraction=0.5)}, "decoder.rotary_fraction is 0.5, expected 1.0$"),
        ({"decoder": replace(FITS.decoder, out_bias=True)}, "decoder.out_bias is True, expected False$"),
        ({"look": "prefix"}, "look is 'prefix', expected 'causal'$"),
        ({"image": replace(FITS.image, stem=(8,)), "look": "prefix"}, "image.stem is .*; look is 'prefix'"),
    ],
)
def test_each_setting_without_a_place_is_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"it does not fit LLaVA's layout: {message}"):
        fitted(replace(FITS, **change), {})


@pytest.mark.parametrize(
    ("decoder", "kind"),
    [
        (replace(FITS.decoder, qk_norm=False), "llama"),
        (replace(FITS.decoder, qk_norm=False, qkv_bias=True), "qwen2"),
        (replace(FITS.decoder, qk_norm=False, qkv_bias=True, out_bias=True), "llama"),
        (FITS.decoder, "qwen3"),
        (replace(FITS.decoder, qk_norm=False, scores=Scores(window=9)), "mistral"),
        (replace(FITS.decoder, rope_scaling=RopeScaling("llama3", 8.0, 64, low=1.0, high=4.0), qk_norm=False), "llama"),
    ],
)
def test_the_language_class_is_the_one_whose_settings_are_equal(decoder: DecoderConfig, kind: str) -> None:
    cfg = replace(FITS, decoder=decoder)
    c, same, tensors = fitted(cfg, VLM(cfg).state_dict())
    assert c["text_config"]["model_type"] == kind
    assert same.decoder.width == 32 and "language_model.model.norm.weight" in tensors


@torch.no_grad()
def test_what_is_written_otherwise_computes_the_same() -> None:
    """A scaled table, norms from one, a narrow projector, an encoder without a last norm."""
    from sightline.core.layout import causal_layout
    from sightline.core.patches import Patches
    from sightline.data.batch import Batch

    decoder = replace(FITS.decoder, scale_embedding=True, norm_offset=True, qk_norm=True)
    image = replace(FITS.image, normed=True, final_norm=False)
    for fusion in (replace(FITS.fusion, hidden=7), replace(FITS.fusion, layers=1, bias=False)):
        cfg = VLMConfig(image, fusion, decoder)
        model = VLM(cfg).eval()
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        same, state = equivalent(cfg, dict(model.state_dict()))
        again = VLM(same).eval()
        again.load_state_dict(state)
        pixels = Patches(torch.randn(16, 768), ((1, 4, 4),))
        batch = Batch(torch.randint(9, 99, (1, 30)), causal_layout(1, 30), torch.arange(3, 19), pixels)
        torch.testing.assert_close(again.logits(again(batch)), model.logits(model(batch)), atol=1e-5, rtol=1e-5)


def test_the_smallest_format_that_loses_nothing() -> None:
    assert exact({"a": torch.tensor([1.0, 0.5])}) == torch.bfloat16
    assert exact({"a": torch.tensor([1.0, 1 + 2**-10])}) == torch.float16
    assert exact({"a": torch.tensor([1.0, 1 + 2**-10]), "b": torch.tensor([1e9])}) == torch.float32


def test_what_is_there_is_not_lost(fitting: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(fitting, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match=f"{out} is there already; --force replaces it"):
        convert(fitting, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "mine.txt").write_text("notes")
    convert(fitting, out, force=True)
    assert {path.name for path in out.iterdir()} == set(before)
    for folder, message in ((fitting, "holds the model that is read"), (tmp_path, "holds the model that is read")):
        with pytest.raises(InputError, match=message):
            convert(fitting, folder, force=True)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "mine.txt").write_text("notes")
    with pytest.raises(InputError, match="holds no model, which alone is replaced"):
        convert(fitting, tmp_path / "papers", force=True)
    (tmp_path / "empty").mkdir()
    convert(fitting, tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["architectures"] == [
        "LlavaForConditionalGeneration"
    ]


FULL_DISK = """
import resource, sys
from pathlib import Path
from sightline.zoo.convert import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), force=True)
except OSError as error:
    sys.exit(f"told: {error}")
"""


@pytest.mark.parametrize("room", [500, 60_000])
def test_a_full_disk_leaves_what_was_there(fitting: Path, tmp_path: Path, room: int) -> None:
    out = tmp_path / "out"
    convert(fitting, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(fitting), str(out), str(room)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.startswith("told: "), done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits", "out"]
