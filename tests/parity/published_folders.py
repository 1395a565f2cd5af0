"""Tiny random checkpoints, written by transformers' classes in the layouts that were published."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
IMAGE_TOKEN = 98
SLOTS = 16  # (28 / 7) squared


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """Every parameter drawn anew, so that none hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def saved(model: Any, folder: Path) -> Path:
    """As transformers itself saves it."""
    model.save_pretrained(folder)
    return folder


def llava(text: str = "llama", vision: str = "clip", **more: Any) -> Any:
    tower = {"clip": hf.CLIPVisionConfig, "siglip": hf.SiglipVisionConfig}[vision](**VISION)
    language = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config}[text](**TEXT)
    config = hf.LlavaConfig(vision_config=tower, text_config=language, image_token_index=IMAGE_TOKEN, **more)
    return randomised(hf.LlavaForConditionalGeneration(config))


def paligemma(text: str = "gemma") -> Any:
    more: dict[str, Any] = {"head_dim": 16, "num_key_value_heads": 1}
    if text == "gemma2":
        more |= {"num_hidden_layers": 3, "sliding_window": 9, "query_pre_attn_scalar": 24}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    config = hf.PaliGemmaConfig(
        vision_config=vision,
        text_config={**TEXT, **more, "model_type": text},
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
    )
    return randomised(hf.PaliGemmaForConditionalGeneration(config))


def in_memory(model: Any) -> dict[str, Tensor]:
    """Tensors by their names in memory, tied ones once."""
    return {k: v for k, v in model.state_dict().items() if not (k == "lm_head.weight" and _tied(model))}


def _tied(model: Any) -> bool:
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def layout_1(model: Any) -> dict[str, Tensor]:
    """The published llava-hf and PaliGemma names."""
    out = {}
    for key, value in in_memory(model).items():
        if key.startswith("model.language_model."):
            key = "language_model.model." + key.removeprefix("model.language_model.")
        elif key.startswith("lm_head."):
            key = "language_model." + key
        else:
            key = key.removeprefix("model.")
        if key.startswith("vision_tower.") and not key.startswith("vision_tower.vision_model."):
            key = "vision_tower.vision_model." + key.removeprefix("vision_tower.")
        out[key] = value
    return out


def layout_2(model: Any) -> dict[str, Tensor]:
    """As transformers 4.52 wrote it."""
    out = {}
    for key, value in layout_1(model).items():
        if key.startswith("language_model.model."):
            key = "model.language_model." + key.removeprefix("language_model.model.")
        elif key.startswith("language_model.lm_head"):
            key = key.removeprefix("language_model.")
        else:
            key = "model." + key
        out[key] = value
    return out


def layout_3(model: Any) -> dict[str, Tensor]:
    """As transformers 5 writes a fresh model: layout 1 without `vision_model.`."""
    return {k.replace("vision_tower.vision_model.", "vision_tower."): v for k, v in layout_1(model).items()}


def original(model: Any) -> dict[str, Tensor]:
    """The names of haotian-liu/LLaVA."""
    out = {}
    for key, value in layout_1(model).items():
        key = key.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")
        key = key.replace("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model.")
        key = key.replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
        out[key.replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")] = value
    return out


def original_internvit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of InternViT by the names of OpenGVLab/InternVL."""
    out = {}
    renamed = {
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "patch_embeddings.projection": "patch_embedding",
        "encoder.layer.": "encoder.layers.",
        "attention.projection_layer": "attn.proj",
        "attention.": "attn.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_": "ls",
    }
    for key, value in tensors.items():
        if "_proj." in key:
            if ".q_proj." not in key:
                continue
            value = torch.cat([tensors[key.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            key = key.replace("q_proj", "qkv")
        for old, new in renamed.items():
            key = key.replace(old, new)
        out[key] = value
    return out


def prompt(images: int, length: int = 12, seed: int = 1) -> Tensor:
    """Ids [1, n] of some text with the slots of `images` images inside."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 90, (length,), generator=generator)
    slots = torch.full((SLOTS,), IMAGE_TOKEN)
    parts = [words[:1]]
    for _ in range(images):
        parts += [slots, words[1:3]]
    return torch.cat([*parts, words[3:]])[None]


def pixels(images: int, size: int = 28, seed: int = 2) -> Tensor:
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(seed))


def picture(width: int, height: int) -> PIL.Image.Image:
    """Colours that change smoothly, with an edge."""
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack((x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x > width // 3) * 200), axis=-1)
    return PIL.Image.fromarray(values.astype(np.uint8))
