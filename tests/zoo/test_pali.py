"""PaLI-X from its paper: the sizes it names, and a tiny one that learns and writes."""

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from sightline.core.sequence import Image, ask
from sightline.data.batch import collate
from sightline.data.images import Square
from sightline.language.tokenizer import train_tokenizer
from sightline.model import VLM
from sightline.serving.engine import Engine
from sightline.serving.sampling import Sampling
from sightline.training.objectives import NextToken
from sightline.zoo import own
from sightline.zoo.describe import describe
from sightline.zoo.pali import PALI_X, STAGES, UL2_32B, config

CONTROLS = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>")
TINY: dict[str, Any] = {
    "image_size": 28,
    "vision_config": {"width": 24, "depth": 2, "heads": 2, "mlp": 48},
    "text_config": {**UL2_32B, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2},
}


def test_the_sizes_of_the_paper() -> None:
    """ViT-22B and a language model of 32 billion parameters: 55 in all, whose first stages leave the encoder."""
    told = describe(PALI_X.name, PALI_X.model, PALI_X.stages)
    assert told.parameters["encoder"] == pytest.approx(22e9, rel=0.02)
    assert told.parameters["decoder"] == pytest.approx(32e9, rel=0.02)
    assert sum(told.parameters.values()) == pytest.approx(55e9, rel=0.02)
    assert told.visual_tokens == 256
    assert set(told.trained.values()) == {sum(told.parameters.values()) - told.parameters["encoder"]}


def test_a_tiny_one_learns_and_writes() -> None:
    texts = ["how many red circles? two here"] * 30
    tokenizer = train_tokenizer(texts, 320, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")
    cfg = config({**TINY, "text_config": {**TINY["text_config"], "vocab_size": tokenizer.vocab_size}})
    assert cfg.image.residual == "parallel" and cfg.image.qk_norm == "head"
    assert cfg.decoder.activation == "silu" and cfg.decoder.gated and not cfg.decoder.tied
    model = VLM(cfg)
    processor = own.ProcessorConfig(Square(28), codec=None).build(tokenizer, model)
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    pictures = Image(PIL.Image.fromarray(pixels)), Image(PIL.Image.fromarray(255 - pixels))
    examples = [processor(ask("how many?", *pictures[:n], answer=said)) for n, said in ((1, "two"), (2, "here here"))]
    batch, objective = collate(examples, 14, 0), NextToken()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(part.removesuffix("*")) for part in STAGES["mixture"]))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, 3e-3), []
    for _ in range(40):
        total, count = objective(model, batch)["next-token"]
        losses.append(float(total.detach()) / count)
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is None for p in model.encoder.parameters())
        optimizer.step()
    assert losses[1] < losses[0] and losses[-1] < 0.1 * losses[0]
    engine = Engine(model, processor)
    replies = engine.answer([ask("how many?", *pictures[:n]) for n in (1, 2)], Sampling(max_new_tokens=8))
    assert [reply.grounded.text for reply in replies] == ["two", "here here"]
    assert [reply.usage["image_tokens"] for reply in replies] == [4, 8]
