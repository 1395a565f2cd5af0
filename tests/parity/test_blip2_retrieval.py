"""BLIP-2's first stage against transformers' retrieval model, and against its losses as LAVIS has computed them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import pixels, randomised, saved
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.data.batch import Batch
from sightline.encoders.vit import ViTConfig
from sightline.fusion.qformer import QFormer, QFormerConfig
from sightline.language.decoder import DecoderConfig
from sightline.model import VLM, VLMConfig
from sightline.training import contrast, representation
from sightline.training.contrast import Scores
from sightline.training.representation import Representation
from sightline.training.settings import RepresentationConfig
from sightline.zoo.backbones import eva_clip_config
from sightline.zoo.blip2 import qformer_config, qformer_keys
from sightline.zoo.checkpoint import read_json, read_tensors
from sightline.zoo.encoder_names import eva_clip_keys
from sightline.zoo.keymap import KeyMap, rule

LAYER = "qformer.encoder.layer.{i}."
TEXT = KeyMap(  # the published names of what a Q-Former reads text with
    (
        rule("embeddings.word_embeddings.weight", "text.words.weight"),
        rule("embeddings.position_embeddings.weight", "text.positions.weight"),
        rule(LAYER + "intermediate.dense.{p}", "text.layers.{i}.words.up.{p}"),
        rule(LAYER + "output.dense.{p}", "text.layers.{i}.words.down.{p}"),
        rule(LAYER + "output.LayerNorm.{p}", "text.layers.{i}.words_norm.{p}"),
        rule("vision_projection.{p}", "picture_projection.{p}"),
        rule("text_projection.{p}", "text_projection.{p}"),
        rule("itm_head.{p}", "match.{p}"),
        rule("cls.predictions.transform.dense.{p}", "say.0.{p}"),
        rule("cls.predictions.transform.LayerNorm.{p}", "say.2.{p}"),
        rule("cls.predictions.bias", "bias"),
    )
)
LAVIS = {  # its names, by those of transformers
    "Qformer.bert.embeddings.LayerNorm": "qformer.layernorm",
    "Qformer.bert.embeddings.": "embeddings.",
    "Qformer.bert.": "qformer.",
    "Qformer.cls.": "cls.",
    "attention.self.": "attention.attention.",
    "vision_proj.": "vision_projection.",
    "text_proj.": "text_projection.",
}


def loaded(fusion: QFormerConfig, cfg: RepresentationConfig, words: int, tensors: dict[str, Tensor]) -> Representation:
    """The objective with published weights, the Q-Former beside it as `fusion`; some of either may be drawn."""
    image = ViTConfig(image_size=8, patch_size=4, width=fusion.inputs, depth=0, heads=1, mlp=8)
    decoder = DecoderConfig(vocab_size=12, width=fusion.width, depth=1, heads=1, mlp=8)
    made = Representation(VLM(VLMConfig(image, fusion, decoder)), words, 0, cfg)
    found = (qformer_keys(fusion).under("", "fusion.") + TEXT).load(tensors)
    made.add_module("fusion", QFormer(fusion))
    absent, strange = made.load_state_dict(found, strict=False)
    assert not strange and set(absent) <= {
        *("log_scale", "fusion.out.weight", "fusion.out.bias", "bias"),
        *(f"say.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")),
    }
    return made.eval()


@pytest.mark.parametrize("text", ["short", "padded"])
def test_scores_are_those_of_the_retrieval_model(tmp_path: Path, text: str) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 7}
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 40}
    sizes |= {"intermediate_size": 40, "max_position_embeddings": 16, "use_qformer_text_input": True}
    config = hf.Blip2Config(vision_config=vision, qformer_config=sizes, num_query_tokens=5, image_text_hidden_size=10)
    theirs = randomised(hf.Blip2ForImageTextRetrieval(config))
    folder = saved(theirs, tmp_path)
    c, tensors = read_json(folder / "config.json"), read_tensors(folder)
    assert c["image_token_index"] is None
    seen = {name.removeprefix("vision_model."): x for name, x in tensors.items() if name.startswith("vision_model.")}
    encoder = eva_clip_config(c["vision_config"]).build()
    encoder.load_state_dict(eva_clip_keys(encoder.config).load(seen))
    rest = {name: x for name, x in tensors.items() if not name.startswith("vision_model.")}
    settings = RepresentationConfig(projection=10, max_length=16)
    ours = loaded(replace(qformer_config(c, 24), inputs=32), settings, 37, rest)
    qformer = ours.get_submodule("fusion")
    assert isinstance(qformer, QFormer)

    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    if text == "padded":
        mask[1, 4:] = mask[2, 2:] = 0
    read = ids.masked_fill(mask == 0, -1)
    given = {"pixel_values": pixels(3), "input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        cosines = theirs(**given).logits_per_image
        logits = theirs(**given, use_image_text_matching_head=True).logits_per_image
        features = theirs.vision_model(given["pixel_values"]).last_hidden_state
        queries, _ = ours.text.told(qformer, features, read)
        found = ours.scores(queries, ours.text.alone(qformer, read)[:, 0]).pictures / ours.log_scale.exp()
        torch.testing.assert_close(found, cosines, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.matches(qformer, features, read), logits, atol=1e-5, rtol=0)
    assert (cosines - cosines.roll(1, 0)).abs().max() > 1e-3 and (logits - logits.roll(1, 0)).abs().max() > 1e-3


class Seen(nn.Module):
    """A model whose encoder has seen the pictures already."""

    def __init__(self, fusion: QFormer) -> None:
        super().__init__()
        self.fusion = fusion


def test_losses_and_gradients_are_those_of_lavis(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_file(Path(__file__).parents[1] / "golden" / "representation" / "lavis.safetensors")
    tensors = {name.removeprefix("weights."): x for name, x in golden.items() if name.startswith("weights.")}
    for theirs, other in LAVIS.items():
        tensors = {name.replace(theirs, other): x for name, x in tensors.items()}
    fusion = QFormerConfig(inputs=12, width=8, queries=3, hidden=16, depth=3, heads=2, mlp=24)
    ours = loaded(fusion, RepresentationConfig(projection=6, max_length=8), 21, tensors)
    qformer = ours.get_submodule("fusion")
    assert isinstance(qformer, QFormer)
    taken: list[Scores] = []

    def likeliest(scores: Scores, same: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        taken.append(scores)
        return tuple(x.masked_fill(same, -1e4).argmax(1) for x in (scores.pictures, scores.captions))  # type: ignore

    said: list[Tensor] = []
    matches = ours.matches
    monkeypatch.setattr(ours, "matches", lambda *given: said.append(matches(*given)) or said[-1])
    monkeypatch.setattr(contrast, "hard_negatives", likeliest)
    monkeypatch.setattr(representation, "features_of", lambda model, batch: golden["features"])
    batch = Batch.__new__(Batch)
    object.__setattr__(batch, "extra", {"captions": golden["captions"]})
    terms = ours(Seen(qformer), batch)
    torch.testing.assert_close(taken[0].pictures, golden["scores"], atol=1e-4, rtol=1e-5)
    assert torch.equal(likeliest(taken[0], torch.eye(4).bool(), torch.zeros(4, 2))[0], golden["wrong_captions"])
    # its rows are true pairs, captions with wrong pictures, pictures with wrong captions; the last two are turned here
    torch.testing.assert_close(said[0][[0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7]], golden["itm_logits"], atol=1e-5, rtol=0)
    for name, (total, count) in terms.items():
        torch.testing.assert_close(total / count, golden[name], atol=1e-5, rtol=0)
    torch.stack([total / count for total, count in terms.values()]).sum().backward()
    assert qformer.queries.grad is not None and ours.text.words.weight.grad is not None
    torch.testing.assert_close(qformer.queries.grad, golden["queries_grad"][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.text.words.weight.grad, golden["words_grad"], atol=1e-4, rtol=1e-4)
    assert F.cosine_similarity(qformer.queries.grad.flatten(), golden["queries_grad"].flatten(), dim=0) > 0.99999
