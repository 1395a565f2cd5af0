"""However a conversation is read, its numbers are the same: in pieces, packed, batched, padded, branched."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.core.layout import COLUMNS
from sightline.core.patches import Patches
from sightline.core.sequence import Conversation, Message, Text
from sightline.data.batch import IGNORE, Batch, Example, pack
from sightline.fusion.bridge import Bridge
from sightline.fusion.vocabulary import VocabularyConfig
from sightline.model import FusionConfig

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
NO_SLOTS = torch.zeros(0, dtype=torch.int64)


def turn(question: str, answer: str) -> Conversation:
    return Message("user", (Text(question),)), Message("assistant", (Text(answer),))


def mixed(tiny: Any) -> list[Example]:
    """Questions of several lengths about no, one and two pictures."""
    return [
        tiny.question(1, "how many?", "two"),
        tiny.question(0, "where where where?", "two two two"),
        tiny.question(2, "how?", "where", seed=5),
        tiny.question(1, "how many many?", "two where", seed=9),
    ]


def prompt_length(example: Example) -> int:
    """Tokens before the answer."""
    return int((example.labels != IGNORE).long().argmax()) + 1


def part(seen: Bridge, inside: Tensor) -> Bridge | None:
    """What a bridge has for some of the slots."""
    if seen.memory is None:
        return Bridge(None if seen.tokens is None else seen.tokens[inside])
    chosen = [i for i, here in enumerate(inside.tolist()) if here]
    if not chosen:
        return None
    items, grids = seen.memory.items(), seen.memory.grids
    return replace(seen, memory=Patches(torch.cat([items[i] for i in chosen]), tuple(grids[i] for i in chosen)))


def in_pieces(tiny: Any, example: Example, stops: list[int]) -> Tensor:
    """Hidden states of one example read with a cache; pictures are seen once and handed out in order."""
    batch, cache, out = tiny.batch(example), tiny.model.new_cache(), []
    seen = None if batch.patches is None else tiny.model.see(batch.patches, batch.instruction)
    for a, b in pairwise([0, *stops]):
        inside = (batch.slots >= a) & (batch.slots < b)
        bridge = None if seen is None else part(seen, inside)
        piece = Batch(batch.ids[:, a:b], batch.layout.span(a, b), batch.slots[inside] - a)
        out.append(tiny.model(piece, cache, bridge))
    return torch.cat(out, dim=1)[0]


@pytest.mark.parametrize("images", [0, 1, 2])
@torch.no_grad()
def test_cached_is_whole(tiny: Any, images: int) -> None:
    example = tiny.question(images, answer="two where two")
    (whole,) = tiny.hidden(example)
    start, stop = prompt_length(example), example.length
    one_by_one = [start, *range(start + 1, stop + 1)]
    cuts = [one_by_one, [start, start + 2, stop]]
    if tiny.model.config.look == "causal":  # a prefix is one block, which is never cut
        cuts += [list(range(1, stop + 1)), [2, 5, 9, stop]]
    for stops in cuts:
        torch.testing.assert_close(in_pieces(tiny, example, stops), whole, **CLOSE)


ORDERS = ["word picture word picture word", "picture word picture", "word picture picture word", "picture picture word"]


def ordered(tiny: Any, order: str, seed: int = 0) -> Example:
    """Words and pictures in an order, then an answer."""
    pictures = iter(tiny.pictures(2, seed))
    parts = [next(pictures) if kind == "picture" else Text(" how") for kind in order.split()]
    return tiny.in_place((Message("user", tuple(parts)), Message("assistant", (Text(" two where"),))))


def test_every_fusion_is_read(fusions: dict[str, FusionConfig]) -> None:
    """The table of equalities is complete: each kind of fusion is a column of it."""
    coded = {VocabularyConfig}  # reads codes, not features: tests/fusion/test_vocabulary.py
    assert {type(cfg) for cfg in fusions.values()} == set(get_args(FusionConfig)) - coded


@torch.no_grad()
def test_pictures_in_any_order_among_words(tiny: Any) -> None:
    """Cached, packed, batched on either side or alone; and what comes before a picture knows nothing of it."""
    examples = [ordered(tiny, order, 10 * i) for i, order in enumerate(ORDERS)]
    alone = tiny.hidden(*examples)
    for side in ("left", "right"):
        batch = tiny.batch(*examples, side=side)
        hidden = tiny.model(batch)
        for row, wanted in enumerate(alone):
            torch.testing.assert_close(hidden[row][batch.layout.document[row] >= 0], wanted, **CLOSE)
    packed = pack(examples, 8, tiny.pad, sum(e.length for e in examples))
    hidden = tiny.model(packed)[0]
    longest = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    for document, i in enumerate(longest):
        torch.testing.assert_close(hidden[packed.layout.document[0] == document], alone[i], **CLOSE)
    for example, wanted in zip(examples, alone, strict=True):
        stops = [prompt_length(example), example.length]
        if tiny.model.config.look == "causal":
            stops = list(range(1, example.length + 1))
        torch.testing.assert_close(in_pieces(tiny, example, stops), wanted, **CLOSE)
    first, other = ordered(tiny, ORDERS[0]), ordered(tiny, ORDERS[0], seed=50)
    other = replace(other, pixels=(first.pixels[0], other.pixels[1]))
    a, b = tiny.hidden(first, other)
    apart = (a - b).abs().amax(1) > 1e-4
    second = int(first.slots[len(first.slots) // 2])
    if tiny.model.config.look == "causal":
        assert not bool(apart[:second].any())
    assert bool(apart[prompt_length(first) :].all())


@pytest.mark.parametrize("talk", [turn("how many?", "two two"), turn("how?", "two") + turn("where?", "two where")])
def test_a_written_answer_is_laid_out_as_a_learned_one(tiny: Any, talk: Conversation) -> None:
    """What `Layout.next` says of each answer token is what the processor wrote for training."""
    example, prompt = tiny.processor(talk), tiny.processor(talk[:-1])
    assert torch.equal(example.ids[: prompt.length], prompt.ids)
    wanted, layout = tiny.batch(example).layout, tiny.batch(prompt).layout
    for t in range(prompt.length, example.length):
        step = layout.next()
        for name in COLUMNS:
            assert torch.equal(getattr(step, name), getattr(wanted.span(t, t + 1), name)), (t, name)
        layout = layout.then(step)


@torch.no_grad()
def test_no_token_that_is_to_be_predicted_is_seen(tiny: Any) -> None:
    """In every turn, what is learned after a token has no way into the numbers that predict it."""
    example = tiny.processor(turn("how many?", "two") + turn("where?", "where two"))
    (hidden,) = tiny.hidden(example)
    learned = (example.labels != IGNORE).nonzero()[:, 0].tolist()
    assert len(learned) > 4
    for t in learned:
        batch = tiny.batch(example)
        batch.ids[0, t + 1 :] = tiny.pad
        torch.testing.assert_close(tiny.model(batch)[0, t], hidden[t], **CLOSE)


@torch.no_grad()
def test_packed_is_separate(tiny: Any) -> None:
    examples = mixed(tiny)
    length = max(e.length for e in examples) + 12
    batch = pack(examples, 8, tiny.pad, length)
    assert len(batch.ids) < len(examples)
    hidden, found = tiny.model(batch), []
    for row in range(len(batch.ids)):
        for document in range(int(batch.layout.document[row].max()) + 1):
            found.append(hidden[row][batch.layout.document[row] == document])
    longest_first = sorted(examples, key=lambda e: -e.length)  # as they are packed
    for wanted in tiny.hidden(*longest_first):
        near = [x for x in found if x.shape == wanted.shape and torch.allclose(x, wanted, **CLOSE)]
        assert len(near) == 1


def test_packed_learns_what_separate_ones_learn(tiny: Any) -> None:
    """The gradient of the summed loss is the sum of the gradients, for pixels' weights too."""

    def gradients(batches: list[Batch]) -> list[Tensor]:
        tiny.model.zero_grad()
        for batch in batches:
            assert batch.labels is not None
            scores = tiny.model.logits(tiny.model(batch)).flatten(0, 1)
            F.cross_entropy(scores, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum").backward()
        return [p.grad.clone() for p in tiny.model.parameters()]

    examples = mixed(tiny)
    packed = gradients([pack(examples, 8, tiny.pad, max(64, max(e.length for e in examples) + 12))])
    for a, b in zip(packed, gradients([tiny.batch(e) for e in examples]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_batched_is_single_padded_on_either_side(tiny: Any, side: str) -> None:
    examples = mixed(tiny)
    batch = tiny.batch(*examples, side=side)
    assert int((batch.layout.document < 0).sum()) > 0
    hidden = tiny.model(batch)
    for row, alone in enumerate(tiny.hidden(*examples)):
        torch.testing.assert_close(hidden[row][batch.layout.document[row] >= 0], alone, **CLOSE)


@torch.no_grad()
def test_left_padded_prompts_go_on_as_alone(tiny: Any) -> None:
    """Answers written behind padding, a token per row and step."""
    examples, cache = mixed(tiny), tiny.model.new_cache()
    batch = tiny.batch(*examples, side="left")
    tiny.model(batch, cache)
    more = torch.randint(10, 200, (len(examples), 3))
    for t in range(3):
        step = Batch(more[:, t : t + 1], cache.layout.next(), NO_SLOTS)
        found = tiny.model(step, cache)[:, 0]
    for row, example in enumerate(examples):
        alone, single = tiny.model.new_cache(), tiny.batch(example)
        tiny.model(single, alone)
        for t in range(3):
            step = Batch(more[row : row + 1, t : t + 1], alone.layout.next(), NO_SLOTS)
            wanted = tiny.model(step, alone)[0, 0]
        torch.testing.assert_close(found[row], wanted, **CLOSE)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", ["causal", "flamingo", "idefics", "expert"])
@torch.no_grad()
def test_branches_are_separate_questions(build: Callable[[str], Any], name: str, images: int) -> None:
    """Many questions behind one picture in one row: each predicts as if it had been the only one."""
    tiny = build(name)
    pictures = tiny.pictures(images)
    turns = [turn("how many?", "two"), turn("how?", "where two"), turn("where?", "two")]
    about = [(Message("user", (*pictures, *question.parts)), answer) for question, answer in turns]
    together = tiny.processor.branches(about[0] + turns[1] + turns[2])
    learned = together.labels != IGNORE
    separate = [tiny.processor(talk) for talk in about]
    wanted = [h[e.labels != IGNORE] for h, e in zip(tiny.hidden(*separate), separate, strict=True)]
    assert together.length < sum(e.length for e in separate) - 2 * len(together.slots)
    torch.testing.assert_close(tiny.model(tiny.batch(together))[0][learned], torch.cat(wanted), **CLOSE)
    assert together.labels[learned].tolist() == [i for e in separate for i in e.labels.tolist() if i != IGNORE]


@pytest.mark.parametrize("name", ["flamingo", "idefics"])
@torch.no_grad()
def test_a_cache_cut_before_a_picture_has_not_seen_it(build: Callable[[str], Any], name: str) -> None:
    """Read, cut back to before the second picture, gone on with another one: as if read so at once."""
    tiny = build(name)
    first, second = tiny.question(2, seed=0), tiny.question(2, seed=40)
    second = replace(second, pixels=(first.pixels[0], second.pixels[1]))
    stop = int(first.slots[1])
    cache = tiny.model.new_cache()
    tiny.model(tiny.batch(first), cache)
    (wanted,) = tiny.hidden(second)
    batch = tiny.batch(second)
    bridge = part(tiny.model.see(batch.patches), batch.slots >= stop)
    rest = Batch(batch.ids[:, stop:], batch.layout.span(stop, second.length), batch.slots[1:] - stop)
    torch.testing.assert_close(tiny.model(rest, cache.cut(stop), bridge)[0], wanted[stop:], **CLOSE)
