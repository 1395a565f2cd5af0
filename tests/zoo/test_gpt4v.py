"""GPT-4V as it is guessed to be: sizes as reported, the same design small enough to write."""

from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from sightline.core.errors import CheckpointError
from sightline.core.sequence import Image, ask
from sightline.data.batch import collate
from sightline.data.images import Square
from sightline.fusion.cross_attention import CrossAttentionFusion
from sightline.language.tokenizer import train_tokenizer
from sightline.model import VLM
from sightline.serving.engine import Engine
from sightline.serving.sampling import Sampling
from sightline.training.objectives import NextToken
from sightline.zoo import gpt4v, own
from sightline.zoo.hollow import hollow
from sightline.zoo.names import locate
from sightline.zoo.published import Published

CONTROLS = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>")
TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 40}
TINY |= {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 90, "max_position_embeddings": 64}
TINY |= {"cross_attn_every_n_layers": 2}
CLIP = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
CLIP |= {"image_size": 28, "patch_size": 7}


def test_its_parameters_are_those_of_the_report() -> None:
    with hollow():
        decoder = VLM(gpt4v.GPT_4V.model).decoder
    total = sum(parameter.numel() for parameter in decoder.parameters())
    attention = 120 * 4 * 10_752**2
    assert attention / 1e9 == pytest.approx(55, abs=1)
    expert = 120 * 3 * 10_752 * 28_672
    assert expert / 1e9 == pytest.approx(111, abs=0.5)
    blocks = 17 * (10_752 * 10_752 * 10 + 2 * 1024 * 10_752)  # of cross-attention, but for norms and gates
    assert total / (attention + 16 * expert + blocks) == pytest.approx(1, abs=0.002)


def test_the_same_design_small_writes_and_looks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VLM(gpt4v.config({**TINY, "vision_config": CLIP})).eval()
    assert isinstance(model.fusion, CrossAttentionFusion)
    for name, parameter in model.named_parameters():
        if "gate1" in name or "gate2" in name:
            parameter.data.fill_(1.0)
    own = Published(model, {"image_token_index": 3}, "gpt-4v", tmp_path)
    ids = torch.tensor([[5, 3, 7, 8], [3, 9, 3, 4]])
    seen = torch.randn(3, 3, 28, 28)
    assert own.generate_ids(5, input_ids=ids, pixel_values=seen).shape == (2, 5)
    found, other = own.logits(input_ids=ids, pixel_values=seen), own.logits(input_ids=ids, pixel_values=-seen)
    assert torch.equal(found[0, 0], other[0, 0]) and float((found[0, 1:] - other[0, 1:]).abs().max()) > 1e-3


def test_a_tiny_one_learns_a_stage_and_writes() -> None:
    """Only what its stage names learns."""
    texts = ["how many red circles? two here"] * 30
    tokenizer = train_tokenizer(texts, 320, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")
    torch.manual_seed(0)
    model = VLM(gpt4v.config({**TINY, "vocab_size": tokenizer.vocab_size, "vision_config": CLIP}))
    processor = own.ProcessorConfig(Square(28), codec=None).build(tokenizer, model)
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    pictures = Image(PIL.Image.fromarray(pixels)), Image(PIL.Image.fromarray(255 - pixels))
    examples = [
        processor(ask("how many?", seen, answer=said)) for seen, said in zip(pictures, ("two", "here"), strict=True)
    ]
    batch, objective = collate(examples, 7, 0), NextToken()
    (names,) = gpt4v.GPT_4V.stages.values()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in names))
    learned = [p for p in model.parameters() if p.requires_grad]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert learned and any(name.startswith("encoder.") for name in frozen)
    optimizer, losses = torch.optim.AdamW(learned, 1e-2), []
    for _ in range(60):
        total, count = objective(model, batch)["next-token"]
        losses.append(float(total.detach()) / count)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    replies = Engine(model.eval(), processor).answer(
        [ask("how many?", seen) for seen in pictures], Sampling(max_new_tokens=4)
    )
    assert [reply.error for reply in replies] == [None, None]


def test_it_cannot_be_loaded() -> None:
    with pytest.raises(CheckpointError, match="no weights of 'gpt-4v' were ever published"):
        locate("gpt-4v")
