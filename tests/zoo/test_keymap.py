"""Rules that read both ways: everything comes back, and what has no place or two is told by name."""

import pytest
import torch
from torch import Tensor

from sightline.core.errors import CheckpointError
from sightline.zoo.keymap import (
    KeyMap,
    by_head,
    flat_patch,
    flipped,
    half_apart,
    halves,
    last_first,
    leading,
    rule,
    stacked,
)

KEYS = KeyMap(
    (
        rule("patch.weight", "patch.weight", reshape=flat_patch(3, 4)),
        rule("cls", "class_token", reshape=leading(2)),
        rule("layers.{i}.mlp.gate_up.{p}", "blocks.{i}.gate.{p}", "blocks.{i}.up.{p}", reshape=halves()),
        rule("layers.{i}.experts.{j}.{p}", "blocks.{i}.experts.{j}.{p}"),
        rule("norm.{p}", "norm.{p}"),
        rule("attn.in_proj_{p}", "attention.q.{p}", "attention.k.{p}", "attention.v.{p}", reshape=stacked(3)),
        rule("proj", "out.weight", reshape=flipped()),
    ),
    ignore=("position_ids", "layers.{i}.inv_freq"),
)


def theirs() -> dict[str, Tensor]:
    tensors = {"patch.weight": torch.randn(5, 3, 4, 4), "cls": torch.randn(1, 1, 5), "norm.weight": torch.randn(5)}
    tensors |= {
        "attn.in_proj_weight": torch.randn(6, 4),
        "attn.in_proj_bias": torch.randn(6),
        "proj": torch.randn(3, 2),
    }
    for i in (0, 10):
        tensors[f"layers.{i}.mlp.gate_up.weight"] = torch.randn(6, 5)
        tensors[f"layers.{i}.mlp.gate_up.bias"] = torch.randn(6)
        tensors[f"layers.{i}.experts.3.weight"] = torch.randn(2, 2)
    return tensors


def test_what_was_read_is_written_back() -> None:
    published = theirs()
    ours = KEYS.load(published)
    assert ours["patch.weight"].shape == (5, 48) and ours["class_token"].shape == (5,)
    assert torch.equal(ours["blocks.10.up.bias"], published["layers.10.mlp.gate_up.bias"][3:])
    assert torch.equal(ours["attention.k.weight"], published["attn.in_proj_weight"][2:4])
    assert torch.equal(ours["out.weight"] @ torch.ones(3), torch.ones(3) @ published["proj"])
    assert torch.equal(ours["patch.weight"][2].unflatten(0, (3, 4, 4)), published["patch.weight"][2])
    again = KEYS.save(ours)
    assert set(again) == set(published)
    assert all(torch.equal(again[key], published[key]) for key in published)


def test_joined_maps_are_cut_as_they_were_packed() -> None:
    """Rows 0 to 11 of two heads with two rows each: below each other, or the three maps of one head side by side."""
    rows = torch.arange(12.0)
    for reshape, wanted in (
        (stacked(3), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (by_head(2, 3), [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]),
    ):
        for joined in (rows, rows[:, None] * torch.ones(5)):
            parts = reshape.there(joined)
            assert [part.reshape(4, -1)[:, 0].tolist() for part in parts] == wanted
            assert torch.equal(reshape.back(parts), joined)


def test_rows_in_another_order() -> None:
    rows = torch.arange(12.0)
    for reshape, wanted in (
        (half_apart(6), [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]),
        (last_first(), [11, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ):
        for published in (rows, rows[:, None] * torch.ones(5)):
            (found,) = reshape.there(published)
            assert found.reshape(12, -1)[:, 0].tolist() == wanted
            assert torch.equal(reshape.back([found]), published)


def test_what_carries_nothing_is_passed_over() -> None:
    found = KEYS.load({**theirs(), "position_ids": torch.arange(3), "layers.7.inv_freq": torch.ones(2)})
    assert set(found) == set(KEYS.load(theirs()))


def test_a_map_below_a_larger_model() -> None:
    inside = KEYS.under("vision.", "encoder.") + KeyMap((rule("head", "decoder.head"),))
    published = {f"vision.{key}": value for key, value in theirs().items()} | {"head": torch.ones(1)}
    ours = inside.load(published | {"vision.position_ids": torch.arange(3)})
    assert {name.split(".")[0] for name in ours} == {"encoder", "decoder"}
    assert set(inside.save(ours)) == set(published)
    with pytest.raises(CheckpointError, match="1 tensors that this model has no place for, such as position_ids"):
        inside.load(published | {"position_ids": torch.arange(3)})


@pytest.mark.parametrize(
    "key",
    ["layers.0.mlp.gate.weight", "layers.x.experts.3.weight", "layers.0.experts.3.a.b", "xnorm.weight", "normXweight"],
)
def test_an_unknown_key_is_told(key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"1 tensors that this model has no place for, such as {key}$"):
        KEYS.load({**theirs(), key: torch.ones(1)})


def test_of_many_unknown_keys_three_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"5 tensors that this model has no place for, such as a0, a1, a2$"):
        KEYS.load({f"a{k}": torch.ones(1) for k in range(5)})


def test_a_parameter_without_a_published_name_is_told() -> None:
    ours = KEYS.load(theirs())
    with pytest.raises(CheckpointError, match=r"1 parameters without a published name, such as extra\.weight"):
        KEYS.save(ours | {"extra.weight": torch.ones(1)})


def test_half_of_a_pair_is_told() -> None:
    ours = KEYS.load(theirs())
    del ours["blocks.10.up.bias"]
    with pytest.raises(CheckpointError, match=r"the parameter blocks\.10\.up\.bias is missing"):
        KEYS.save(ours)
    ours = KEYS.load(theirs())
    del ours["blocks.10.gate.bias"]
    with pytest.raises(CheckpointError, match=r"without a published name, such as blocks\.10\.up\.bias"):
        KEYS.save(ours)


def test_two_rules_for_one_key_are_refused_both_ways() -> None:
    twice = KeyMap((rule("a.{p}", "x.{p}"), rule("a.weight", "y.weight")))
    with pytest.raises(CheckpointError, match=r"such as a\.weight"):
        twice.load({"a.weight": torch.ones(1)})
    back = KeyMap((rule("a.{p}", "x.{p}"), rule("b.{p}", "x.{p}")))
    with pytest.raises(CheckpointError, match=r"the parameter x\.weight has two published names"):
        back.save({"x.weight": torch.ones(1)})


def test_two_tensors_for_one_parameter_are_refused() -> None:
    """Otherwise the file's order would decide which one is used."""
    back = KeyMap((rule("a.{p}", "x.{p}"), rule("b.{p}", "x.{p}")))
    with pytest.raises(CheckpointError, match=r"b\.weight is one of several tensors for the parameter x\.weight"):
        back.load({"a.weight": torch.ones(1), "b.weight": torch.zeros(1)})


def test_numbers_may_differ_between_the_two_sides() -> None:
    """Blocks that are counted apart in the file stand among others here; each name still has one rule."""
    rules = rule("norm.{p}", "norm.{p}"), rule("layers.{i}.{p}", "blocks.{i}.{p}")
    apart = KeyMap(rules, ignore=("layers.{i}.freq",))
    keys = apart.numbered({0: 0, 1: 2})
    published = {f"{name}.weight": torch.randn(2) for name in ("norm", "layers.0", "layers.1")}
    ours = keys.load(published | {"layers.7.freq": torch.zeros(1)})
    assert set(ours) == {"norm.weight", "blocks.0.weight", "blocks.2.weight"}
    assert torch.equal(ours["blocks.2.weight"], published["layers.1.weight"])
    assert set(keys.save(ours)) == set(published)
    with pytest.raises(CheckpointError, match=r"1 tensors that this model has no place for, such as layers\.2\.weight"):
        keys.load(published | {"layers.2.weight": torch.zeros(1)})
