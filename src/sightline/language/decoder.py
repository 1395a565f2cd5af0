"""One decoder whose settings are many language models; its blocks are given, so it never imports fusion.

- LLaMA (arXiv:2302.13971), InternLM2: RMSNorm before each branch, half-split rotary positions, SwiGLU, no biases.
- Mistral (arXiv:2310.06825) looks back a window; Mixtral (arXiv:2401.04088) and Aria have experts.
- Qwen, Qwen2 (arXiv:2407.10671): LLaMA with biases on queries, keys and values; Qwen stretches itself to longer texts.
- Gemma (arXiv:2403.08295): norm weights stored minus one, tanh-GELU gate, embeddings times sqrt(width), tied head.
- Gemma 2 (arXiv:2408.00118): norms before and after each branch, capped scores, every other block looks back a window.
- OPT (arXiv:2205.01068): layer norms, learned positions, a plain ReLU feed-forward, biases everywhere.
- Magneto (arXiv:2210.06423; Kosmos-2): a norm before each output map, sinusoidal positions, inputs times sqrt(width).
- Persimmon (Fuyu): half of each head is turned, layer norms of queries and keys, squared ReLU.
- Chameleon (arXiv:2405.09818): norms of queries and keys with weights for each head; the largest norms what is added.
- MPT: ALiBi instead of positions, layer norms without biases.
- Qwen2-VL (arXiv:2409.12191): a part of each head is turned by time, one by height, one by width.
- Llama 4: experts scaled at their input, attention within stretches, every fourth block without positions.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import config
from ..core.errors import ConfigError
from ..core.layout import Layout, Run, visible
from ..core.memory import Memory
from ..layers.attention import Attention, QKNorm, chosen
from ..layers.experts import Experts, ExpertsConfig
from ..layers.feedforward import FeedForward, GatedFeedForward
from ..layers.linear import working_precision
from ..layers.native import MOST_ROWS
from ..layers.norms import RMSNorm
from ..layers.rotary import RopeScaling, rotary_table
from ..layers.scores import Places, Scores
from .cache import Cache, LayerCache
from .context import Context
from .stepper import Stepper

MOSTLY_APART = 0.6  # share of all pairs of tokens up to which documents attend by themselves


@config
class DecoderConfig:
    """Sizes and settings of a decoder."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width / heads
    activation: str = "silu"
    gated: bool = True  # gate, up, down instead of up, down
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True  # of layer norms
    norm_at: Literal["before", "after", "both"] = "before"  # where a branch is normed: what it reads, what it adds
    inner_norm: bool = False  # norms before the output maps of attention and feed-forward (arXiv:2210.06423)
    eps: float = 1e-6
    norm_offset: bool = False  # norm weights are stored as their difference from one
    positions: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary"
    position_offset: int = 0  # the row of the table at which positions begin
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0  # how much of each head is turned
    mrope_section: tuple[int, int, int] | None = None  # pairs of each head turned by time, height, width; None: no axes
    scores: Scores = Scores()
    full_every: int | None = None  # each so many-th block sees as far as the text goes, whatever window or chunk say
    full_positions: bool = True  # whether those blocks have rotary positions; they alone have a temperature if not
    logit_softcap: float | None = None  # logits stay below it, by a tanh
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool | QKNorm = False
    tied: bool = False  # the head is the embedding table
    scale_embedding: bool = False  # embeddings times sqrt(width)
    scale_inputs: bool = False  # every input times sqrt(width), those of images as well
    max_length: int = 2048  # tokens of context the model was trained for
    unwritten: tuple[int, ...] = ()  # ids that are read and never written, such as words of pictures
    extra_vocab: int = 0  # ids after vocab_size whose rows are parameters of their own, to be learned alone (IDEFICS)
    extra_written: bool = True  # whether these ids are written too, or only read (Llama 3.2)

    def __post_init__(self) -> None:
        kv_heads = self.kv_heads or self.heads
        if min(self.vocab_size, self.width, self.heads, kv_heads, self.mlp, self.extra_vocab + 1) < 1:
            raise ConfigError("a decoder's sizes are at least 1, extra_vocab at least 0")
        if self.heads % kv_heads:
            raise ConfigError(f"{self.heads} heads cannot share {kv_heads} heads of keys alike")
        if self.positions == "rotary" and (self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_size):
            found = self.rotary_dim
            raise ConfigError(f"heads of {found} numbers cannot be turned in pairs, expected an even number")
        if self.mrope_section is not None:
            self._check_axes(self.mrope_section)
        if self.full_every is not None and self.full_every < 1:
            raise ConfigError(f"full_every is {self.full_every}, expected at least 1")
        if self.unwritten and not 0 <= min(self.unwritten) <= max(self.unwritten) < self.vocab_size:
            raise ConfigError(f"unwritten ids up to {max(self.unwritten)}, expected 0 to {self.vocab_size - 1}")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ConfigError(f"logit_softcap is {self.logit_softcap}, expected more than 0")
        if self.inner_norm and (self.gated or self.experts):
            raise ConfigError("inner_norm is known for a plain feed-forward, expected gated to be false and no experts")
        if self.experts is not None and not self.gated:
            raise ConfigError("experts are gated feed-forwards, expected gated to be true")

    def _check_axes(self, section: tuple[int, int, int]) -> None:
        """ConfigError where positions on three axes do not fit the other settings."""
        if self.positions != "rotary" or min(section) < 0 or 2 * sum(section) != self.rotary_dim:
            raise ConfigError(
                f"mrope_section {section} of {self.rotary_dim} rotary numbers, expected half as many pairs"
            )
        if self.scores.by_place or (self.rope_scaling is not None and self.rope_scaling.by_length):
            raise ConfigError("mrope_section is set, but scores or rope_scaling count tokens, which three axes do not")

    @property
    def head_size(self) -> int:
        """Numbers of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def rotary_dim(self) -> int:
        """Numbers of each head that are turned by its position."""
        return int(self.head_size * self.rotary_fraction)

    def is_full(self, layer: int) -> bool:
        """Whether block `layer`, counted from 0, sees as far as the text goes."""
        return self.full_every is not None and (layer + 1) % self.full_every == 0

    def new_norm(self) -> nn.Module:
        """A norm of what the blocks hand on."""
        if self.norm == "rms":
            return RMSNorm(self.width, self.eps, self.norm_offset)
        return nn.LayerNorm(self.width, self.eps, bias=self.norm_bias)

    @property
    def total_vocab(self) -> int:
        """How many ids there are to be written."""
        return self.vocab_size + (self.extra_vocab if self.extra_written else 0)


class SelfBlock(nn.Module):
    """Self-attention and feed-forward, each branch normed before, after or both; `layer` is its place from 0 on."""

    def __init__(self, cfg: DecoderConfig, layer: int = 0) -> None:
        super().__init__()
        before, after = cfg.norm_at != "after", cfg.norm_at != "before"
        self.norm1 = cfg.new_norm() if before else nn.Identity()
        self.attention = self_attention(cfg, layer)
        self.after1 = cfg.new_norm() if after else nn.Identity()
        self.norm2 = cfg.new_norm() if before else nn.Identity()
        self.feedforward = feedforward(cfg, layer)
        self.after2 = cfg.new_norm() if after else nn.Identity()
        self.bare = not after  # a branch's last product is all that is added to the stream
        self.turned = cfg.full_positions or not cfg.is_full(layer)

    @property
    def plain(self) -> bool:
        """Whether it is one norm and one branch twice, as `layers.native` knows it."""
        norms = type(self.norm1) is type(self.norm2) is RMSNorm
        return norms and isinstance(self.after1, nn.Identity) and self.turned and self.attention.plain

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        c = context
        rotary = c.rotary if self.turned else None
        seen = (self.norm1(x), c.mask, c.causal, rotary, cache, c.rows, c.places)
        x = chosen(x, c.rows)
        if self.bare:
            x = self.attention(*seen, onto=x, runs=c.runs)
            return self.feedforward(self.norm2(x), onto=x)
        x = x + self.after1(self.attention(*seen, runs=c.runs))
        return x + self.after2(self.feedforward(self.norm2(x)))


def self_attention(cfg: DecoderConfig, layer: int) -> Attention:
    """The attention of block `layer`."""
    scores, qk_norm = cfg.scores, cfg.qk_norm
    if cfg.is_full(layer):
        scores = replace(scores, window=None, chunk=None)
    if not cfg.full_positions and cfg.is_full(layer):
        qk_norm = qk_norm if isinstance(qk_norm, bool) or not qk_norm.after_rotary else False
    elif not cfg.full_positions:
        scores = replace(scores, temperature=None)
    heads = cfg.heads, cfg.kv_heads, cfg.head_dim
    norm = nn.LayerNorm(cfg.heads * cfg.head_size, cfg.eps) if cfg.inner_norm else None
    return Attention(cfg.width, *heads, cfg.qkv_bias, cfg.out_bias, qk_norm, scores, norm)


def feedforward(cfg: DecoderConfig, layer: int) -> nn.Module:
    """The feed-forward of block `layer`, or its experts."""
    if cfg.experts is not None and (layer + 1) % cfg.experts.every == 0:
        return Experts(cfg.width, cfg.experts, cfg.activation)
    if cfg.gated:
        return GatedFeedForward(cfg.width, cfg.mlp, cfg.activation, cfg.mlp_bias)
    norm = nn.LayerNorm(cfg.mlp, cfg.eps) if cfg.inner_norm else None
    return FeedForward(cfg.width, cfg.mlp, cfg.activation, cfg.mlp_bias, norm)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, cfg: DecoderConfig, blocks: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.config = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        rows = cfg.max_length + cfg.position_offset
        self.positions = nn.Embedding(rows, cfg.width) if cfg.positions == "learned" else None
        self.blocks = nn.ModuleList(plain_blocks(cfg) if blocks is None else blocks)
        self.norm = cfg.new_norm()
        self.head = None if cfg.tied else nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        self.extra_embedding = nn.Embedding(cfg.extra_vocab, cfg.width) if cfg.extra_vocab else None
        split = cfg.extra_vocab and cfg.extra_written and not cfg.tied
        self.extra_head = nn.Linear(cfg.width, cfg.extra_vocab, bias=False) if split else None
        self.stepper: Stepper | None = None  # how single tokens are written, once prepared for inference
        self.unwritten: Tensor | None = None  # the configured ids, once they were needed
        self.kept: torch.dtype | None = None  # precision of keys and values in a cache; None: their own
        self.reset()

    def reset(self) -> None:
        """Random start: every map keeps the size of what it reads, branches add up to the size of the stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                table = name.removeprefix("extra_") in ("embedding.weight", "positions.weight", "head.weight")
                std = 0.02 if table and not self.config.scale_embedding else parameter.shape[1] ** -0.5
                if name.endswith(("o.weight", "down.weight")):
                    std *= (2 * len(self.blocks)) ** -0.5
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [batch, length] to vectors [batch, length, width]."""
        if self.extra_embedding is None:
            x = self.embedding(ids)
        else:
            extra = ids - self.config.vocab_size
            rows = self.embedding(ids.clamp(max=self.config.vocab_size - 1))
            x = torch.where((extra >= 0)[..., None], self.extra_embedding(extra.clamp(min=0)), rows)
        if self.config.scale_embedding:  # the factor is rounded to the weights' precision, as Gemma's code does
            x = x * torch.tensor(self.config.width**0.5, dtype=x.dtype)
        return x

    def placed(self, x: Tensor, layout: Layout) -> Tensor:
        """Input vectors [batch, length, width], scaled and with the positions that are added to them."""
        c = self.config
        if c.scale_inputs:
            x = x * c.width**0.5
        if self.positions is not None:
            return x + self.positions(layout.position + c.position_offset).to(x.dtype)
        if c.positions == "sinusoidal":
            return x + sinusoidal(layout.position + c.position_offset, c.width).to(x.dtype)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary in float32, [..., total_vocab]."""
        scores, most = self._logits(hidden), self.config.logit_softcap
        if self.extra_embedding is not None and self.config.extra_written:
            x = hidden.to(self.dtype)
            extra = F.linear(x, self.extra_embedding.weight) if self.extra_head is None else self.extra_head(x)
            scores = torch.cat((scores, extra.float()), dim=-1)
        scores = scores if most is None else most * torch.tanh(scores / most)
        if not self.config.unwritten:
            return scores
        if self.unwritten is None or self.unwritten.device != scores.device:
            with torch.inference_mode(False):  # what is made while answering may be needed for learning
                self.unwritten = torch.tensor(self.config.unwritten, device=scores.device)
        return scores.index_fill(-1, self.unwritten, torch.finfo(scores.dtype).min)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.stepper is not None and hidden.shape[:-1].numel() <= MOST_ROWS:
            return self.stepper.head(hidden.float())
        if self.head is not None:
            return self.head(hidden.to(self.dtype)).float()
        return F.linear(hidden, self.embedding.weight.to(hidden.dtype)).float()

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def new_cache(self, capacity: int = 0) -> Cache:
        """An empty cache."""
        return Cache(len(self.blocks), capacity, self.kept)

    def context(
        self, layout: Layout, keys: Layout, memory: Memory | None, dtype: torch.dtype, first: int | None = None
    ) -> Context:
        """Masks and rotary tables of one step; `first` is how many of the keys were read first."""
        rotary = self.rotary(layout, keys, dtype, first) if self.config.positions == "rotary" else None
        places = Places(layout, keys) if self.config.scores.by_place else None
        looks = blind = None
        if memory is not None:
            looks = memory.looks(layout)
            blind = ~looks.any(dim=2, keepdim=True)
            looks = (looks | blind)[:, None]  # a softmax over nothing is not a number
        causal = keys.causal and (layout.length == keys.length or layout.length == 1)
        mask = None if causal else visible(layout, keys)[:, None]
        runs = None if causal or keys is not layout else apart(layout)
        causal = causal and layout.length > 1
        return Context(layout, mask, causal, rotary, memory, looks, blind, places=places, runs=runs)

    def rotary(self, layout: Layout, keys: Layout, dtype: torch.dtype, first: int | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [batch, 1, length, rotary_dim] of the tokens of `layout`."""
        c, length = self.config, None
        if c.rope_scaling is not None and c.rope_scaling.by_length:
            settled = keys.span(0, first) if c.rope_scaling.kind == "ntk" and first is not None else keys
            length = settled.position.amax(1) + 1
        section = c.mrope_section if layout.position.dim() == 3 else None  # text alone is at one place on every axis
        if layout.position.dim() == 3 and section is None:
            raise ValueError("positions on three axes for a decoder without mrope_section")
        cos, sin = rotary_table(layout.position, c.rotary_dim, c.rope_theta, dtype, c.rope_scaling, length, section)
        return cos[:, None], sin[:, None]

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        memory: Memory | None = None,
        cache: Cache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Vectors [batch, length, width] to normed hidden states of the same shape.

        rows: the tokens [n] that are asked for, counted through the batch; then [n, width], and what the last block
        does to a token once it has been attended to is done to these only.
        """
        x = working_precision(self.placed(x, layout))
        keys = cache.read(layout) if cache else layout
        memory = cache.remember(memory, layout) if cache else memory
        context = self.context(layout, keys, memory, x.dtype, cache.first if cache else None)
        if self.stepper is not None and cache is not None and self.stepper.takes(x, cache):
            assert context.rotary is not None
            return chosen(self.stepper.step(x, context.rotary, context.mask, cache), rows)
        for i, block in enumerate(self.blocks):
            if rows is not None and i == len(self.blocks) - 1:
                context = replace(context, rows=rows)
            x = block(x, context, cache.layers[i] if cache else None)
        return self.norm(x)


def apart(layout: Layout) -> tuple[Run, ...] | None:
    """The documents of rows, where it pays on a CPU that each attends to itself alone; None elsewhere."""
    if layout.document.device.type != "cpu":
        return None
    runs = layout.runs()
    squares = sum((stop - start) ** 2 for _, start, stop in runs)
    return runs if squares < MOSTLY_APART * layout.batch * layout.length**2 else None


def plain_blocks(cfg: DecoderConfig) -> list[nn.Module]:
    """The blocks of a decoder that nothing is fused into."""
    return [SelfBlock(cfg, layer) for layer in range(cfg.depth)]


def sinusoidal(position: Tensor, width: int) -> Tensor:
    """Sines and then cosines [..., width] of integer positions [...], as in tensor2tensor (arXiv:1706.03762)."""
    half = width // 2
    rate = 10_000.0 ** -(torch.arange(half, device=position.device, dtype=torch.float32) / (half - 1))
    angle = position[..., None].float() * rate
    return torch.cat((angle.sin(), angle.cos()), dim=-1)
