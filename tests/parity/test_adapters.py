"""Adapters against peft: what we write gives the same outputs there, what peft writes gives them here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import (
    TEXT,
    VISION,
    layout_1,
    layout_3,
    llava,
    paligemma,
    pixels,
    prompt,
    randomised,
    saved,
    write,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from sightline.layers.adapted import adapted, merge
from sightline.training.adapters import Lora, adapt, load_adapters, save_adapters
from sightline.zoo.published import Published, load_published

peft = pytest.importorskip("peft")
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
LEARN = {
    "llava": {"decoder.*": Lora(4, 8), "decoder.*.attention.*": Lora(2, 6), "encoder.blocks.1.*": Lora(3)},
    "llama": {"blocks.*": Lora(4, 8), "head.weight": Lora(2)},
    "paligemma": {"decoder.*": Lora(4), "fusion.*": Lora(2)},
}


def pair(kind: str, folder: Path) -> tuple[Any, Published, dict[str, Tensor]]:
    """A model of transformers', the same of ours, inputs for both."""
    made = {"llava": llava, "paligemma": paligemma, "llama": lambda: randomised(hf.LlamaForCausalLM(CONFIG))}[kind]()
    tensors = made.state_dict() if kind == "llama" else layout_1(made)
    ours = load_published(write(folder / "base", made.config.to_dict(), tensors))
    if kind == "llama":
        return made, ours, {"input_ids": prompt(0)}
    inputs = {"input_ids": prompt(1), "pixel_values": pixels(1)}
    if kind == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return made, ours, inputs


CONFIG = hf.LlamaConfig(**TEXT)


def draw(model: torch.nn.Module) -> None:
    """Values for everything that belongs to an adapter, and is nothing at first."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name.lower():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", LEARN)
def test_ours_in_peft(tmp_path: Path, kind: str, dora: bool) -> None:
    theirs, ours, inputs = pair(kind, tmp_path)
    with torch.no_grad():
        plain = theirs(**inputs).logits
    adapt(ours.model, {p: Lora(how.rank, how.alpha, dora=dora) for p, how in LEARN[kind].items()})
    draw(ours.model)
    save_adapters(ours.model, tmp_path / "adapter", ours.family, base=str(tmp_path / "base"))
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = loaded(**inputs).logits
    torch.testing.assert_close(ours.logits(**inputs), wanted, **TOLERANCE)
    assert (wanted - plain).abs().max() > 0.05
    layers = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)]
    assert len(layers) == len(adapted(ours.model))


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("kind", LEARN)
def test_pefts_in_ours(tmp_path: Path, kind: str, more: dict[str, bool]) -> None:
    theirs, ours, inputs = pair(kind, tmp_path)
    pattern = {} if more.get("use_rslora") else {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 3}}
    targets = ["q_proj", "o_proj", "down_proj"] + (["linear_1"] if kind == "llava" else [])
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **pattern, **more)
    made = peft.get_peft_model(theirs, settings).eval()
    draw(made)
    made.save_pretrained(tmp_path / "adapter")
    load_adapters(ours.model, tmp_path / "adapter", ours.family)
    with torch.no_grad():
        wanted = made(**inputs).logits
    torch.testing.assert_close(ours.logits(**inputs), wanted, **TOLERANCE)
    merge(ours.model)
    ours.save(tmp_path / "merged")
    torch.testing.assert_close(load_published(tmp_path / "merged").logits(**inputs), wanted, **TOLERANCE)


@pytest.mark.parametrize("dora", [False, True])
def test_maps_that_are_one_there(tmp_path: Path, dora: bool) -> None:
    """EVA-CLIP's queries, keys and values, with adapters of their own rank and scale, or none; and back from peft's."""
    theirs = randomised(hf.Blip2VisionModel(hf.Blip2VisionConfig(**VISION)))
    base, images = saved(theirs, tmp_path / "base"), pixels(2)
    ours = load_published(base)
    adapt(ours.model, {"blocks.*.q.*": Lora(2, 6, dora=dora), "blocks.*.v.*": Lora(3, 1, dora=dora)})
    draw(ours.model)
    save_adapters(ours.model, tmp_path / "adapter", ours.family)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = loaded(images).last_hidden_state
    torch.testing.assert_close(ours.features(images), wanted, **TOLERANCE)
    draw(loaded)
    loaded.save_pretrained(tmp_path / "theirs")
    again = load_published(base)
    load_adapters(again.model, tmp_path / "theirs", again.family)
    with torch.no_grad():
        wanted = loaded(images).last_hidden_state
    torch.testing.assert_close(again.features(images), wanted, **TOLERANCE)


@pytest.mark.parametrize("layout", [layout_1, layout_3])
def test_names_of_older_layouts_are_read(tmp_path: Path, layout: Callable[[Any], dict[str, Tensor]]) -> None:
    """Adapters made with transformers before 4.52 name a LLaVA's maps as its published file does."""
    theirs, ours, inputs = pair("llava", tmp_path)
    adapt(ours.model, {"*.blocks.*": Lora(4, 8)})
    draw(ours.model)
    save_adapters(ours.model, tmp_path / "adapter", "llava")
    file, prefix, older = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.", {}
    for now, then in zip(theirs.state_dict(), layout(theirs), strict=True):
        older[now.removesuffix(".weight")] = then.removesuffix(".weight")
    tensors = {}
    for key, value in load_file(file).items():
        module, part = key.removeprefix(prefix).split(".lora_")
        assert older[module] != module
        tensors[f"{prefix}{older[module]}.lora_{part}"] = value
    save_file(tensors, file)
    again = load_published(tmp_path / "base")
    load_adapters(again.model, tmp_path / "adapter", "llava")
    torch.testing.assert_close(again.logits(**inputs), ours.logits(**inputs), atol=0.0, rtol=0.0)
