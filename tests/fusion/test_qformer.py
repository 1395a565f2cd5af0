"""The Q-Former: what is asked changes what is seen, padding does not, and text is given exactly where it is read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.core.errors import ConfigError, InputError
from sightline.core.layout import causal_layout
from sightline.core.patches import Patches
from sightline.data.batch import Batch
from sightline.encoders.vit import ViTConfig
from sightline.fusion.qformer import QFormer, QFormerConfig
from sightline.language.decoder import DecoderConfig
from sightline.model import VLM, VLMConfig

SIZES: Any = {"inputs": 6, "width": 8, "queries": 3, "hidden": 8, "depth": 3, "heads": 2, "mlp": 12}
PICTURE = Patches(torch.linspace(-1, 1, 24).reshape(4, 6), ((1, 2, 2),))


def instructed() -> QFormer:
    fusion = QFormer(QFormerConfig(**SIZES, vocab_size=10, max_length=5))
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(std=1.0)
    return fusion.eval()


def test_layers_that_look_at_the_features() -> None:
    fusion = QFormer(QFormerConfig(**{**SIZES, "depth": 5}, cross_every=2))
    assert [layer.cross is not None for layer in fusion.layers] == [True, False, True, False, True]


@torch.no_grad()
def test_the_instruction_and_its_order_change_the_tokens_and_padding_does_not() -> None:
    fusion = instructed()

    def tokens(*ids: int) -> Tensor:
        out = fusion(PICTURE, torch.tensor([ids])).tokens
        assert out is not None
        return out

    torch.testing.assert_close(tokens(3, 4, -1, -1), tokens(3, 4))
    for other in ((4, 3), (3, 5), (3,)):
        assert not torch.allclose(tokens(*other), tokens(3, 4), atol=1e-3)


def test_text_is_given_exactly_where_it_is_read() -> None:
    ids = torch.tensor([[3, 4]])
    with pytest.raises(InputError, match="reads an instruction with each picture, none was given"):
        instructed()(PICTURE)
    with pytest.raises(InputError, match="reads no instruction, one was given"):
        QFormer(QFormerConfig(**SIZES))(PICTURE, ids)
    with pytest.raises(InputError, match="2 instructions for 1 pictures"):
        instructed()(PICTURE, ids.repeat(2, 1))
    with pytest.raises(InputError, match="an instruction of 6 tokens, this Q-Former reads 5"):
        instructed()(PICTURE, ids.repeat(1, 3))


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        QFormerConfig(**SIZES, cross_every=0)
    with pytest.raises(ConfigError, match="a width of 8 cannot be shared by 3 heads alike"):
        QFormerConfig(**{**SIZES, "heads": 3})


@torch.no_grad()
def test_a_model_gives_its_fusion_the_batch_s_instructions() -> None:
    image = ViTConfig(image_size=8, patch_size=4, width=6, depth=1, heads=2, mlp=8)
    config = VLMConfig(
        image,
        QFormerConfig(**SIZES, vocab_size=10),
        DecoderConfig(vocab_size=12, width=8, depth=1, heads=2, mlp=8),
    )
    model = VLM(config).eval()
    assert config.instruction_length == 512
    pixels = Patches(torch.randn(4, 48), ((1, 2, 2),))
    ids = torch.zeros(1, 5, dtype=torch.int64)
    asked = torch.tensor([[3, 4]])
    batch = Batch(ids, causal_layout(1, 5), torch.arange(3), pixels, instruction=asked).to("cpu")
    bridge = model.see(pixels, asked)
    torch.testing.assert_close(model(batch), model(batch, bridge=bridge))
    with pytest.raises(InputError, match="none was given"):
        model(Batch(ids, causal_layout(1, 5), torch.arange(3), pixels))
