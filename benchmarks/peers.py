"""The two shapes of the benchmarks, in transformers and here, from the same weights."""

from typing import Any

import torch
import transformers as hf

from sightline.model import VLM
from sightline.zoo import llava

IMAGE_TOKEN = 5
SLOTS = 196

SHAPES: dict[str, dict[str, Any]] = {
    "micro": {
        "vision": hf.CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
            image_size=224, patch_size=16,
        ),
        "text": hf.LlamaConfig(
            vocab_size=4096, hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5,
            num_key_value_heads=5, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
        ),
        "strategy": "default",
    },
    "small": {
        "vision": hf.SiglipVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            image_size=224, patch_size=16,
        ),
        "text": hf.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
        ),
        "strategy": "full",
    },
}  # fmt: skip


def pair(shape: str) -> tuple[Any, VLM]:
    """The same weights as transformers' LLaVA and as ours, float32."""
    torch.manual_seed(0)
    parts = SHAPES[shape]
    config = hf.LlavaConfig(
        vision_config=parts["vision"],
        text_config=parts["text"],
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=parts["strategy"],
        vision_feature_layer=-1 if parts["strategy"] == "full" else -2,
        tie_word_embeddings=True,
    )
    theirs = hf.LlavaForConditionalGeneration(config).eval()
    settings = llava.config(config.to_dict() | {"text_config": {**config.text_config.to_dict()}})
    ours = VLM(settings).eval()
    state = {k: v.clone() for k, v in llava.published(theirs.state_dict()).items()}
    tower = {k for k in state if k.startswith("vision_tower.vision_model.head.")}
    ours.load_state_dict(llava.keys(settings).load({k: v for k, v in state.items() if k not in tower}))
    return theirs, ours
