"""A vision-language model: an encoder sees, a fusion bridges, a decoder reads and writes.

The language model may itself be an encoder that reads and a decoder that writes beside it.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .core.config import config
from .core.errors import ConfigError
from .core.layout import Axes
from .core.memory import Memory, arrange, side_by_side
from .core.patches import Grid, Patches, Tiling
from .data.batch import Batch
from .encoders.audio import AudioConfig, AudioEncoder
from .encoders.vit import ViTConfig
from .encoders.vq import VQConfig
from .fusion.anyres import AnyRes, AnyResConfig
from .fusion.bridge import Bridge
from .fusion.cross_attention import CrossAttentionConfig
from .fusion.glu import GLUConfig
from .fusion.pooling import LatentPoolConfig, PositionPoolConfig, SizedPoolConfig
from .fusion.projector import ProjectorConfig
from .fusion.qformer import QFormerConfig
from .fusion.resampler import ResamplerConfig
from .fusion.visual_expert import VisualExpertConfig
from .fusion.vocabulary import VocabularyConfig
from .grounding.heads import BoxHead, BoxHeadConfig
from .grounding.sampler import RegionSampler, SamplerConfig
from .language.cache import Cache
from .language.decoder import Decoder, DecoderConfig
from .language.seq2seq import Seq2Seq, Seq2SeqConfig

FusionConfig = (
    ProjectorConfig
    | AnyResConfig
    | GLUConfig
    | ResamplerConfig
    | PositionPoolConfig
    | LatentPoolConfig
    | SizedPoolConfig
    | QFormerConfig
    | CrossAttentionConfig
    | VisualExpertConfig
    | VocabularyConfig
)  # told apart by `kind`
if TYPE_CHECKING:  # which of both a family has is settled where its configuration is read, out of mypy's sight
    LanguageConfig = Any
else:
    LanguageConfig = DecoderConfig | Seq2SeqConfig  # told apart by `kind`, which only the latter has


@config
class VLMConfig:
    """The three parts and how the text looks at the image.

    audio: an encoder of sounds beside that of pictures. regions: what makes tokens of regions that are referred to.
    box_head: what reads places as numbers where an answer begins one.
    look: "causal", or "prefix" where image and question see themselves whole (PaliGemma).
    tokens_per_second: on a decoder's axis of time, how many places a second of film takes (Qwen2.5-VL); None: one for
    each step of time.
    """

    image: ViTConfig | VQConfig
    fusion: FusionConfig
    decoder: LanguageConfig
    look: Literal["causal", "prefix"] = "causal"
    tokens_per_second: float | None = None
    audio: AudioConfig | None = None
    regions: SamplerConfig | None = None
    box_head: BoxHeadConfig | None = None

    def __post_init__(self) -> None:
        coded, words = isinstance(self.image, VQConfig), isinstance(self.fusion, VocabularyConfig)
        if coded != words or (isinstance(self.image, VQConfig) and len(self._words) != self.image.codes):
            raise ConfigError(f"an encoder of codes needs a word for each, found {len(self._words)} words")
        if max(self._words, default=0) >= self.decoder.vocab_size:
            raise ConfigError(f"a code's word is {max(self._words)} of a vocabulary of {self.decoder.vocab_size}")
        axes = self._sections is not None
        if axes and (not isinstance(self.fusion, ProjectorConfig) or self.fusion.transposed):
            raise ConfigError("mrope_section places tokens by rows and columns, expected a projector that keeps them")
        if self.tokens_per_second is not None and (not axes or self.tokens_per_second <= 0):
            raise ConfigError(f"tokens_per_second is {self.tokens_per_second}, expected more than 0 and mrope_section")
        if self.beside and isinstance(self.fusion, CrossAttentionConfig | VisualExpertConfig):
            raise ConfigError(f"a fusion of kind {self.fusion.kind!r} lives in a decoder, not in an encoder-decoder")
        if self.beside and self.look != "causal":
            raise ConfigError(f"look is {self.look!r}, but an encoder-decoder sees all that it reads")
        sampler, width = self.regions, self.decoder.width
        if sampler is not None and (sampler.inputs, sampler.width) != (self.vit.features, width):
            sizes = f"{sampler.inputs} numbers into {sampler.width}"
            raise ConfigError(f"regions makes {sizes}, expected {self.vit.features} into {width}")
        if self.box_head is not None and self.box_head.width != width:
            raise ConfigError(f"box_head reads {self.box_head.width} numbers, expected the decoder's {width}")

    @property
    def vit(self) -> ViTConfig:
        """The settings of the encoder, of a model that sees by a vision transformer."""
        assert isinstance(self.image, ViTConfig)
        return self.image

    @property
    def _words(self) -> tuple[int, ...]:
        """The words of codes, if there are any."""
        return self.fusion.ids if isinstance(self.fusion, VocabularyConfig) else ()

    @property
    def _sections(self) -> tuple[int, ...] | None:
        """How a decoder's rotary positions share three axes, where they do."""
        return None if self.beside else self.decoder.mrope_section

    @property
    def axes(self) -> Axes | None:
        """How tokens are placed on three axes, where the decoder knows them."""
        if self._sections is None or not isinstance(self.fusion, ProjectorConfig):
            return None
        return Axes(self.fusion.shuffle, self.tokens_per_second)

    @property
    def beside(self) -> bool:
        """Whether an encoder of text reads, and what is written stands in a sequence of its own."""
        return isinstance(self.decoder, Seq2SeqConfig)

    @property
    def start(self) -> int | None:
        """The id that begins what is written beside what is read; None where it follows what is read."""
        return self.decoder.start_id if self.beside else None

    @property
    def framed(self) -> bool:
        """Whether each picture's first and last token frame its patches, as in `core.layout.framed`."""
        return isinstance(self.fusion, VisualExpertConfig) and isinstance(self.fusion.adapter, GLUConfig)

    @property
    def instruction_length(self) -> int:
        """The most tokens of an instruction that the fusion reads with each picture; 0: it reads none."""
        fusion = self.fusion
        return fusion.max_length if isinstance(fusion, QFormerConfig) and fusion.vocab_size else 0


class VLM(nn.Module):
    """Encoder, fusion and decoder; stateless, the caller owns batch and cache.

    Where the decoder is an encoder-decoder, pictures go into what its encoder reads: the `source` of a batch, whose
    own tokens are those to be written. All else is the same, a cache included: the source comes with the first tokens.
    """

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.config = cfg
        self.encoder = cfg.image.build()
        self.fusion = cfg.fusion.build()
        self.decoder: Decoder | Seq2Seq
        if cfg.beside:
            self.decoder = Seq2Seq(cfg.decoder)
        else:
            self.decoder = Decoder(cfg.decoder, self.fusion.blocks(cfg.decoder))
        self.audio = None if cfg.audio is None else AudioEncoder(cfg.audio)
        self.audio_map = None if cfg.audio is None else nn.Linear(cfg.audio.width, cfg.decoder.width)
        self.sampler = None if cfg.regions is None else RegionSampler(cfg.regions)
        self.box_head = None if cfg.box_head is None else BoxHead(cfg.box_head)

    @property
    def device(self) -> torch.device:
        return self.decoder.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def num_tokens(self, grid: Grid, tiling: Tiling | None = None) -> int:
        """How many slots of the sequence a picture takes whose pixels, or those of each of its items, have a grid."""
        seen = self.config.image.feature_grid(grid)
        if isinstance(self.fusion, AnyRes):
            return self.fusion.num_tokens(seen, tiling)
        return self.fusion.num_tokens(seen) * (1 if tiling is None else tiling.items)

    def see(self, patches: Patches, instruction: Tensor | None = None) -> Bridge:
        """Pixel patches to what the decoder is given of them.

        instruction: ids [items, length] for a fusion that reads text with each picture (`QFormer`).
        """
        features = replace(self.encoder(patches), tilings=patches.tilings)
        bridge: Bridge = self.fusion(features) if instruction is None else self.fusion(features, instruction)
        return bridge if self.sampler is None else replace(bridge, features=features)

    def embed(self, ids: Tensor, slots: Tensor, bridge: Bridge | None) -> Tensor:
        """Token vectors [batch, length, width] with the bridge's tokens in their slots (flat indices)."""
        x = self.decoder.embed(ids)
        tokens = None if bridge is None else bridge.tokens
        if bridge is not None and bridge.ids is not None:
            tokens = self.decoder.embed(bridge.ids)
        if tokens is None:
            return x
        if len(slots) != len(tokens):
            raise ValueError(
                f"{len(tokens)} image tokens for {len(slots)} slots; features would land on the wrong tokens"
            )
        return x.flatten(0, 1).index_copy(0, slots, tokens.to(x.dtype)).view_as(x)

    def added(self, x: Tensor, batch: Batch, bridge: Bridge | None) -> Tensor:
        """Token vectors [batch, length, width] with those made of sounds and of regions in their slots."""
        made = []
        if batch.sounds is not None:
            if self.audio is None or self.audio_map is None:
                raise ValueError("sounds for a model that has no encoder of them")
            made.append((batch.sounds.slots, self.audio_map(self.audio.listen(batch.sounds.frames).values)))
        if batch.regions is not None:
            if self.sampler is None or bridge is None or bridge.features is None:
                raise ValueError("regions without a sampler, or without the features of their pictures")
            made.append((batch.regions.slots, self.sampler(bridge.features, batch.regions)))
        for slots, tokens in made:
            x = x.flatten(0, 1).index_copy(0, slots, tokens.to(x.dtype)).view_as(x)
        return x

    def memory(self, bridge: Bridge, batch: Batch) -> Memory | None:
        """What a bridge has for cross-attention blocks, in the rows of the batch that its items belong to."""
        if bridge.memory is None:
            return None
        owners, count = batch.owners, len(bridge.memory.grids)
        if owners is None:
            row, place = batch.slots // batch.layout.length, batch.slots % batch.layout.length
            owners = torch.stack((row, batch.layout.document[row, place], batch.layout.item[row, place]), dim=1)
        if len(owners) != count:
            raise ValueError(f"{count} pictures for {len(owners)} places; tokens would look at the wrong ones")
        lengths = [t * h * w for t, h, w in bridge.memory.grids]
        ends = side_by_side(batch.slots, owners) if bridge.adjacent and batch.owners is None else None
        made = arrange(bridge.memory.values, lengths, owners, batch.layout.batch, bridge.latest, ends)
        if batch.looks is None:
            return made
        which = (made.item - 1).clamp(min=0)[:, None].expand(-1, batch.layout.length, -1)
        return replace(made, seen=batch.looks.gather(2, which) & (made.document >= 0)[:, None])

    def forward(
        self, batch: Batch, cache: Cache | None = None, bridge: Bridge | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Normed hidden states [batch, length, width]; a `bridge` computed before replaces the batch's patches.

        rows: the tokens [n] that are asked for, counted through the batch; then [n, width].
        """
        read = batch if batch.source is None else batch.source
        if bridge is None and read.patches is not None:
            bridge = self.see(read.patches, read.instruction)
        x = self.added(self.embed(read.ids, read.slots, bridge), read, bridge)
        memory = None if bridge is None else self.memory(bridge, read)
        if batch.source is not None:
            assert isinstance(self.decoder, Seq2Seq)
            memory, x = self.decoder.encode(x, read.layout), self.decoder.embed(batch.ids)
        hidden: Tensor = self.decoder(x, batch.layout, memory, cache, rows)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary in float32."""
        return self.decoder.logits(hidden)

    def places(self, hidden: Tensor) -> Tensor:
        """Places [..., 4] at hidden states [..., width]: centre and sides as shares of the picture that is seen."""
        if self.box_head is None:
            raise ConfigError("this model has no head that reads places, expected box_head in its settings")
        found: Tensor = self.box_head(hidden.to(self.dtype))
        return found

    def new_cache(self, capacity: int = 0) -> Cache:
        """An empty cache for this model."""
        return self.decoder.new_cache(capacity)
