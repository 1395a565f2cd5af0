"""An engine whose model writes a given text, so that what becomes of the text can be told."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from sightline.data.images import Square
from sightline.encoders.vit import ViTConfig
from sightline.fusion.projector import ProjectorConfig
from sightline.language.decoder import DecoderConfig
from sightline.language.tokenizer import train_tokenizer
from sightline.model import VLM, VLMConfig
from sightline.serving.engine import Engine
from sightline.zoo.own import ProcessorConfig

CONTROLS = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>")
TEXTS = [" one two three four five, six seven"] * 30


@pytest.fixture(scope="session")
def writer() -> Callable[..., Engine]:
    """writer(text): an engine that writes this text after any prompt, then ends; no token may occur in it twice.

    Every token's embedding is an axis of its own, branches add nothing, and the head leads from each token to the
    next: a real model in every other respect. `context` is how many tokens the model holds.
    """
    tokenizer = train_tokenizer(TEXTS, 330, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")

    def write(text: str, context: int = 256) -> Engine:
        ids = [tokenizer.control("<assistant>"), *tokenizer.encode(text), tokenizer.control("<eos>")]
        assert len(set(ids)) == len(ids), f"{text!r} has a token twice"
        size = tokenizer.vocab_size
        config = VLMConfig(
            image=ViTConfig(image_size=16, patch_size=8, width=8, depth=1, heads=1, mlp=8),
            fusion=ProjectorConfig(inputs=8, width=size + size % 2),
            decoder=DecoderConfig(vocab_size=size, width=size + size % 2, depth=1, heads=1, mlp=8, max_length=context),
        )
        model = VLM(config)
        with torch.no_grad():
            for block in model.decoder.blocks:
                block.attention.o.weight.zero_()
                block.feedforward.down.weight.zero_()
            model.decoder.embedding.weight.copy_(torch.eye(size, config.decoder.width))
            model.decoder.head.weight.zero_()
            for before, after in pairwise(ids):
                model.decoder.head.weight[after, before] = 1.0
        settings = ProcessorConfig(Square(16), codec=None, max_length=context)
        return Engine(model, settings.build(tokenizer, model))

    return write
