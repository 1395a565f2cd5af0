"""What pictures have to do with answers: nothing where there are none, everything where there are some."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sightline.core.patches import Patches
from sightline.core.sequence import ask
from sightline.data.batch import IGNORE, Batch
from sightline.serving.engine import Engine
from sightline.serving.sampling import Sampling
from sightline.zoo import own
from sightline.zoo.prepared import prepared

SHORT = Sampling(max_new_tokens=4)


def test_without_a_picture_no_weight_of_seeing_is_touched(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an encoder was asked about no picture")

    monkeypatch.setattr(tiny.model.encoder, "forward", refuse)
    monkeypatch.setattr(tiny.model.fusion, "forward", refuse)
    (reply,) = Engine(tiny.model, tiny.processor).answer([ask("how many?")], SHORT)
    assert reply.error is None and reply.usage["image_tokens"] == 0
    tiny.model.zero_grad()
    tiny.model(tiny.batch(tiny.question(0))).sum().backward()
    assert all(p.grad is None for part in (tiny.model.encoder, tiny.model.fusion) for p in part.parameters())
    sees = ("cross_attention", "cross_gate1", "cross_norm1", ".vision.")
    touched = [name for name, p in tiny.model.decoder.named_parameters() if p.grad is not None]
    assert touched and not [name for name in touched if any(part in name for part in sees)]
    with pytest.raises(AssertionError, match="asked about no picture"):
        tiny.model(tiny.batch(tiny.question(1)))


def test_a_picture_is_seen_once_however_long_the_answer(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], tiny.model.encoder.forward
    monkeypatch.setattr(tiny.model.encoder, "forward", lambda patches: seen.append(patches.grids) or forward(patches))
    (reply,) = Engine(tiny.model, tiny.processor).answer([ask("how many?", *tiny.pictures(2))], SHORT)
    assert len(reply.ids) == 4
    assert seen == [((1, 4, 4), (1, 4, 4))]


@pytest.mark.parametrize("images", [1, 2])
def test_every_pixel_moves_the_answer_s_probability(tiny: Any, images: int) -> None:
    example = tiny.question(images)
    batch = tiny.batch(example)
    pixels = batch.patches.values.requires_grad_()
    logits = tiny.model.logits(tiny.model(batch))[0]
    learned = example.labels != IGNORE
    logits.log_softmax(-1)[learned, example.labels[learned]].sum().backward()
    assert pixels.grad is not None and pixels.grad.shape == (16 * images, 192)
    assert float((pixels.grad != 0).float().mean()) > 0.99


@torch.no_grad()
def test_pictures_in_another_order_are_another_question(tiny: Any) -> None:
    first, second = tiny.pictures(2)
    examples = [tiny.processor(ask("how?", *seen)) for seen in ((first, second), (second, first), (first, first))]
    one, two, same = (tiny.model.logits(h[-1]) for h in tiny.hidden(*examples))
    assert float((one - two).abs().max()) > 1e-3  # numbers that should be alike are so to 1e-6
    assert float((one - same).abs().max()) > 1e-3


@torch.no_grad()
def test_features_that_do_not_fill_the_slots_are_refused(tiny: Any) -> None:
    batch = tiny.batch(tiny.question(2))
    instruction = None if batch.instruction is None else batch.instruction[:1]
    bridge = tiny.model.see(Patches(torch.randn(16, 192), ((1, 4, 4),)), instruction)
    slots = len(batch.slots)
    told = "1 pictures for 2 places" if bridge.tokens is None else f"{slots // 2} image tokens for {slots} slots"
    with pytest.raises(ValueError, match=told):
        tiny.model(batch, bridge=bridge)


@pytest.mark.parametrize("images", [0, 1, 2])
@torch.no_grad()
def test_saved_and_loaded_is_the_same_model(tiny: Any, images: int, tmp_path: Path) -> None:
    own.save(tiny.model, tiny.tokenizer, tiny.settings, tmp_path / "model")
    published, processor = own.load(tmp_path / "model")
    talk = ask("how many?", *tiny.pictures(images))
    before, after = tiny.processor(talk), processor(talk)
    assert torch.equal(before.ids, after.ids) and torch.equal(before.block, after.block)
    assert published.model.config == tiny.model.config
    inputs = {"pixel_values": torch.stack(after.pixels)} if images else {}
    wanted = tiny.model.logits(tiny.model(tiny.batch(before)))
    assert torch.equal(published.model.logits(published.model(tiny.batch(after))), wanted)
    if images and (asked := tiny.batch(after).instruction) is not None:  # as InstructBLIP's Q-Former is given it
        inputs |= {"qformer_input_ids": asked.clamp(min=0), "qformer_attention_mask": (asked >= 0).long()}
    found = published.logits(input_ids=after.ids[None], **inputs)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_answers_are_the_same_alone_in_a_batch_and_behind_a_shared_prefix(tiny: Any, packed: bool) -> None:
    model = prepared(tiny.model) if packed else tiny.model
    (one, two), engine = tiny.pictures(2), Engine(model, tiny.processor)
    asked = [
        ("how many?", one),
        ("how?", one),
        ("where where?", one),
        ("how many?",),
        ("how?", two, one),
        ("how?", two),
    ]
    talks = [ask(words, *pictures) for words, *pictures in asked]
    together = [reply.ids for reply in engine.answer(talks, SHORT)]
    assert together == [engine.answer([talk], SHORT)[0].ids for talk in talks]
    assert together == [reply.ids for reply in Engine(tiny.model, tiny.processor).answer(talks, SHORT)]
    assert len({together[i] for i in (0, 3)}) == 2


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@torch.no_grad()
def test_in_fewer_bits_scores_are_nearly_the_same(tiny: Any, precision: Any) -> None:
    """Whole and with a cache, where keys and values may be kept in another precision."""
    batch, twin = tiny.batch(tiny.question(2)), prepared(tiny.model, precision)
    wanted, cache = tiny.model.logits(tiny.model(batch)), twin.new_cache()
    found = twin.logits(twin(batch, cache))
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    step = Batch(torch.tensor([[20]]), cache.layout.next(), torch.zeros(0, dtype=torch.int64))
    own = tiny.model.new_cache()
    tiny.model(batch, own)
    wanted, found = (each.logits(each(step, held)) for each, held in ((tiny.model, own), (twin, cache)))
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_in_mixed_precision_scores_are_nearly_the_same_and_all_is_learned(tiny: Any) -> None:
    batch = tiny.batch(tiny.question(2), tiny.question(1))
    wanted = tiny.model.logits(tiny.model(batch)).detach()
    tiny.model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        learned = tiny.model.logits(tiny.model(batch))
        with torch.no_grad():
            found = tiny.model.logits(tiny.model(batch, tiny.model.new_cache()))
    real = batch.layout.document >= 0
    for scores in (learned, found):
        assert float((scores.detach() - wanted)[real].norm() / wanted[real].norm()) < 0.1
    learned[real].square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in tiny.model.parameters())
