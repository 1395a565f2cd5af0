"""Codes of pictures as words of the decoder's vocabulary."""

from dataclasses import replace

import pytest
import torch

from sightline.core.config import from_dict, to_dict
from sightline.core.errors import ConfigError
from sightline.core.layout import causal_layout
from sightline.core.patches import Patches, patchify
from sightline.data.batch import Batch
from sightline.encoders.vit import ViTConfig
from sightline.encoders.vq import VQConfig
from sightline.fusion.vocabulary import VocabularyConfig
from sightline.language.decoder import DecoderConfig
from sightline.model import VLM, VLMConfig

CODED = VQConfig(image_size=8, width=32, multipliers=(1, 2), depth=1, latent=6, codes=5, code_width=4)
TEXT = DecoderConfig(vocab_size=20, width=16, depth=2, heads=2, mlp=24, unwritten=(11, 13))
MODEL = VLMConfig(CODED, VocabularyConfig((19, 11, 13, 12, 17)), TEXT)


def test_a_picture_is_read_as_its_words() -> None:
    model = VLM(MODEL).eval()
    patches = patchify(torch.randn(1, 3, 4, 6), 2)
    ids, slots = torch.randint(1, 10, (1, 9)), torch.arange(2, 8)
    words = ids.clone()
    words[0, 2:8] = torch.tensor(MODEL.fusion.ids)[model.encoder(patches).values[:, 0]]
    layout = causal_layout(1, 9)
    shown = model(Batch(ids, layout, slots, patches))
    assert torch.equal(shown, model(Batch(words, layout, slots[:0])))
    assert model.num_tokens((1, 2, 3)) == 6 and not list(model.fusion.parameters())


def test_words_that_are_never_written() -> None:
    model = VLM(MODEL).eval()
    with torch.inference_mode():
        scores = model.logits(torch.randn(3, 16))
    lowest = torch.finfo(torch.float32).min
    assert (scores == lowest).sum() == 6 and bool((scores[:, [11, 13]] == lowest).all())
    model.logits(torch.randn(3, 16)).logsumexp(-1).sum().backward()  # after answering, learning is possible


def test_the_order_of_codes_is_that_of_the_codebook() -> None:
    fusion = MODEL.fusion.build()
    assert fusion(Patches(torch.tensor([[4], [0], [0]]), ((1, 1, 3),))).ids.tolist() == [17, 19, 19]


def test_settings_come_back_from_plain_values() -> None:
    """Data without a kind is the other encoder's, whose keys are checked as before."""
    assert from_dict(VLMConfig, to_dict(MODEL)) == MODEL
    vit = ViTConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, mlp=8)
    plain = to_dict(MODEL) | {"image": to_dict(vit), "fusion": {"kind": "projector", "inputs": 16, "width": 16}}
    assert from_dict(VLMConfig, plain).image == vit
    plain["image"]["widht"] = 3
    with pytest.raises(ConfigError, match=r"unknown key 'image.widht'; did you mean 'width'"):
        from_dict(VLMConfig, plain)
    del plain["image"]["widht"], plain["image"]["width"]
    with pytest.raises(ConfigError, match=r"key 'image.width' is missing"):
        from_dict(VLMConfig, plain)


def test_codes_and_words_go_together() -> None:
    with pytest.raises(ConfigError, match="an encoder of codes needs a word for each, found 2 words"):
        replace(MODEL, fusion=VocabularyConfig((1, 2)))
    with pytest.raises(ConfigError, match="a code's word is 20 of a vocabulary of 20"):
        replace(MODEL, fusion=VocabularyConfig((1, 2, 3, 4, 20)))
    with pytest.raises(ConfigError, match="an encoder of codes needs a word for each"):
        replace(MODEL, image=ViTConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, mlp=8))
    with pytest.raises(ConfigError, match="unwritten ids up to 20, expected 0 to 19"):
        replace(TEXT, unwritten=(3, 20))
    with pytest.raises(ConfigError, match="0 ids of codes"):
        VocabularyConfig(())
