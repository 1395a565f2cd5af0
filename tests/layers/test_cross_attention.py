"""Attention to other tokens, against torch's own module and step by step."""

import pytest
import torch
from torch import nn

from sightline.core.errors import ConfigError
from sightline.layers.cross_attention import CrossAttention


@pytest.mark.parametrize("memory", [None, 5])
@torch.no_grad()
def test_it_is_torch_s_multihead_attention(memory: int | None) -> None:
    ours = CrossAttention(8, 2, memory=memory)
    theirs = nn.MultiheadAttention(8, 2, kdim=memory, vdim=memory, batch_first=True)
    joined = torch.cat([ours.q.bias, ours.k.bias, ours.v.bias])
    weights = {"in_proj_bias": joined, "out_proj.weight": ours.o.weight, "out_proj.bias": ours.o.bias}
    if memory is None:
        weights["in_proj_weight"] = torch.cat([ours.q.weight, ours.k.weight, ours.v.weight])
    else:
        weights |= {f"{x}_proj_weight": getattr(ours, x).weight for x in "qkv"}
    theirs.load_state_dict(weights)
    x, keys, values = torch.randn(3, 4, 8), torch.randn(3, 6, memory or 8), torch.randn(3, 6, memory or 8)
    seen = torch.tensor([True, True, False, True, False, True])
    wanted = theirs(x, keys, values, key_padding_mask=~seen.expand(3, -1))[0]
    torch.testing.assert_close(ours(x, keys, values, seen[None]), wanted)
    torch.testing.assert_close(ours(x, keys), theirs(x, keys, keys)[0])


@torch.no_grad()
def test_norms_are_over_each_head() -> None:
    ours = CrossAttention(8, 2, head_dim=6, bias=False, qk_norm=nn.LayerNorm)
    assert ours.q_norm is not None and ours.k_norm is not None
    for norm in (ours.q_norm, ours.k_norm):
        norm.weight.normal_()
        norm.bias.normal_()
    x, keys = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    q = torch.stack([ours.q_norm(head) for head in ours.q(x)[0].split(6, dim=1)])
    k = torch.stack([ours.k_norm(head) for head in ours.k(keys)[0].split(6, dim=1)])
    v = torch.stack(ours.v(keys)[0].split(6, dim=1))
    out = torch.softmax(q @ k.transpose(1, 2) / 6**0.5, dim=-1) @ v
    torch.testing.assert_close(ours(x, keys)[0], ours.o(torch.cat(list(out), dim=1)))


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="a width of 8 cannot be shared by 3 heads alike"):
        CrossAttention(8, 3)
    assert CrossAttention(8, 3, head_dim=4).o.in_features == 12


@torch.no_grad()
def test_heads_that_share_keys_are_as_keys_repeated() -> None:
    shared, whole = CrossAttention(8, 4, head_dim=6, kv_heads=2), CrossAttention(8, 4, head_dim=6)
    state = shared.state_dict()
    assert state["k.weight"].shape == (12, 8)
    for name in ("k.weight", "k.bias", "v.weight", "v.bias"):
        state[name] = state[name].unflatten(0, (2, 6)).repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    x, keys = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(shared(x, keys), whole(x, keys))
    torch.testing.assert_close(shared(x[:, :1], keys), whole(x[:, :1], keys))
