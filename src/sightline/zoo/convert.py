"""A model in another layout: this project's own, or that of LLaVA in transformers, which other engines read as well.

What does not fit a layout is told by its settings: a candidate configuration is written and read back, and whatever
then differs from the model is what the layout has no place for. Nothing is rounded: weights are written in the smallest
format that holds each of them exactly.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.config import nearest
from ..core.errors import ConfigError, InputError
from ..data.images import CenterCrop, PadSquare, Scaling, Square
from ..data.processor import Processor, whole as all_in_a_row
from ..data.template import TEMPLATES, VICUNA_SYSTEM
from ..encoders.vit import ViTConfig
from ..encoders.vq import VQConfig
from ..fusion.projector import ProjectorConfig
from ..language.decoder import DecoderConfig
from ..language.seq2seq import Seq2SeqConfig
from ..language.tokenizer import Tokenizer
from ..layers.attention import QKNorm
from ..model import VLM, VLMConfig
from . import llava, own
from .checkpoint import INDEX, whole, write_json, write_pieces
from .languages import ACTIVATIONS
from .processors import chat_template, load_processor
from .published import Published, load_published

LAYOUTS = ("sightline", "llava")
SMALL = (".json", ".jinja", ".tiktoken", ".txt", ".model")  # what lies beside weights and says how to use them


@dataclass(frozen=True)
class Opened:
    """A loaded model with its processor; jinja: the chat template that came with it, if one did."""

    published: Published
    model: VLM
    processor: Processor
    jinja: str | None
    stages: Mapping[str, tuple[str, ...]]


def convert(source: Path, folder: Path, layout: str | None = None, force: bool = False) -> str:
    """Write the model of one folder into another and tell what was written.

    layout: "sightline" or "llava"; without it our own models become LLaVA's and all others ours. force: whether a
    model that is in the other folder may be replaced. The folder is written whole or not at all.
    Raises InputError for a folder that may not be written, ConfigError for a model that does not fit the layout.
    """
    ours = own.is_own(source)
    layout = layout or ("llava" if ours else "sightline")
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}{nearest(layout, LAYOUTS)}")
    if ours and layout == "sightline":
        raise InputError(f"{source} is in this project's own layout already")
    _free(source, folder, force)
    opened = _open(source, ours)
    if layout == "llava":
        return _to_llava(opened, folder)
    return _to_own(opened, folder)


def _free(source: Path, folder: Path, force: bool) -> None:
    """Refuse a folder whose content would be lost."""
    here, there = source.resolve(), folder.resolve()
    if here == there or there in here.parents:
        raise InputError(f"{folder} holds the model that is read, expected another folder to write into")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not force:
        raise InputError(f"{folder} is there already; --force replaces it")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model, which alone is replaced; expected another folder")


def _open(source: Path, ours: bool) -> Opened:
    """The model of a folder and all that says how it is used."""
    if ours:
        published, processor = own.load(source)
        files = source / own.PUBLISHED if (source / own.PUBLISHED).is_dir() else source
        stages = own.read_card(source).stages
    else:
        published, files, stages = load_published(source), source, {}
        found = load_processor(published)
        if not isinstance(published.model, VLM) or found is None:
            raise InputError(f"{source}: a {published.family} without a tokenizer or pictures, expected a whole model")
        processor = found
    assert isinstance(published.model, VLM)
    return Opened(published, published.model, processor, chat_template(files), stages)


def exact(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The smallest format of floating-point numbers that holds all of these exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for tensor in tensors.values()):
            return dtype
    return torch.float32


# ---------------------------------------------------------------------------------------------- this project's layout


def _to_own(opened: Opened, folder: Path) -> str:
    """Write our layout; the small files that the model came with are kept as they are, and used."""
    published, source = opened.published, opened.published.folder
    files = [*sorted(source.glob("*")), *sorted(source.glob("*/*"))]  # a second tokenizer has a folder of its own
    small = [path for path in files if path.is_file() and path.suffix in SMALL and path.name != INDEX]
    beside = {f"{own.PUBLISHED}/{path.relative_to(source)}": path.read_bytes() for path in small}
    if (source / "generation_config.json").exists():
        beside["generation_config.json"] = (source / "generation_config.json").read_bytes()
    dtype = exact(opened.model.state_dict())
    settings = own.PublishedProcessor(published.family)
    own.save(opened.model, opened.processor.tokenizer, settings, folder, dtype=dtype, beside=beside)
    return f"{folder}: a {published.family} model in this project's layout, {_name(dtype)}"


# ------------------------------------------------------------------------------------------- LLaVA's, of transformers


def _to_llava(opened: Opened, folder: Path) -> str:
    """Write `LlavaForConditionalGeneration`, its tokenizer, its picture pipeline and its chat template."""
    processor, tokenizer = opened.processor, opened.processor.tokenizer
    c, model, tensors = fitted(opened.model.config, opened.model.state_dict())
    if processor.expand is not all_in_a_row:
        raise ConfigError("it does not fit LLaVA's layout: tokens stand around a picture's own, expected none")
    assert isinstance(model.image, ViTConfig)
    pixels, jinja = _pixels(processor.pixels), opened.jinja or _jinja(processor)
    name, spec = _image_token(processor)
    image = spec.control(name)
    if jinja is not None and opened.jinja is None:
        jinja = jinja.replace("IMAGE", name)
    tensors, c["text_config"]["vocab_size"] = _with_row(tensors, image, tokenizer, model.decoder)
    ends = {key: spec.controls.get(getattr(spec, key)) for key in ("bos", "eos", "pad")}
    ids: dict[str, Any] = {f"{key}_token_id": index for key, index in ends.items() if index is not None}
    if said := opened.published._ends():  # which may be several, and need not be the tokenizer's
        ids["eos_token_id"] = said if len(said) > 1 else said[0]
    dtype = exact(tensors)
    c |= {
        "image_token_index": image,
        "image_seq_length": opened.model.num_tokens((1, model.image.grid, model.image.grid)),
    }
    c["dtype"] = c["text_config"]["dtype"] = c["vision_config"]["dtype"] = _name(dtype)
    c["text_config"] |= {key: value for key, value in ids.items() if key != "pad_token_id"}
    with whole(folder) as new:
        write_pieces(new, {key: value.to(dtype) for key, value in tensors.items()})
        write_json(new / "config.json", c)
        write_json(new / "generation_config.json", ids)
        spec.save(new)
        write_json(new / "tokenizer_config.json", _tokenizer_config(spec, processor))
        write_json(new / "preprocessor_config.json", pixels)
        write_json(new / "processor_config.json", _processor_config(c, name, model.image))
        (new / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    text, vision = c["text_config"]["model_type"], c["vision_config"]["model_type"]
    return f"{folder}: LlavaForConditionalGeneration of {vision} and {text}, {_name(dtype)}"


def fitted(cfg: VLMConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], VLMConfig, dict[str, Tensor]]:
    """A `config.json` of LLaVA that says what these settings say, those settings, and the weights by its names.

    Raises ConfigError, which tells every setting that the layout has no place for.
    """
    same, tensors = equivalent(cfg, dict(state))
    apart: list[list[str]] = []
    for text in TEXTS.values():
        assert isinstance(same.image, ViTConfig) and isinstance(same.decoder, DecoderConfig)
        c = {**_outer(same), "vision_config": _vision(same.image), "text_config": text(same.decoder)}
        try:
            found, _ = equivalent(llava.config(c), {})
        except ConfigError as error:
            raise ConfigError(f"it does not fit LLaVA's layout: {error}") from None
        apart.append(differences(same, found))
        if not apart[-1]:
            return c, same, llava.keys(same).save(tensors)
    fewest = min(apart, key=lambda each: len(each))
    raise ConfigError(f"it does not fit LLaVA's layout: {'; '.join(fewest)}")


def equivalent(cfg: VLMConfig, state: dict[str, Tensor]) -> tuple[VLMConfig, dict[str, Tensor]]:
    """The same function in the plainest settings, with its weights: what a layout lacks may be a matter of writing."""
    image, fusion, decoder = cfg.image, cfg.fusion, cfg.decoder
    if isinstance(image, VQConfig) or isinstance(decoder, Seq2SeqConfig):
        kind = "image is 'codes'" if isinstance(image, VQConfig) else "decoder is an encoder-decoder"
        raise ConfigError(f"it does not fit LLaVA's layout: {kind}, expected a picture's features in a decoder")
    if not image.final_norm:  # a norm that is there and not applied
        image = replace(image, final_norm=True, normed=False)
        if state:
            state |= {"encoder.norm.weight": torch.ones(image.width), "encoder.norm.bias": torch.zeros(image.width)}
    if isinstance(fusion, ProjectorConfig):
        fusion, state = _two_layers(fusion, state)
    if decoder.norm_offset:
        for name in state:  # queries and keys have norms of their own, which are never stored so
            if name.startswith("decoder.") and "attention" not in name and name.split(".")[-2].startswith("norm"):
                state[name] = state[name] + 1
        decoder = replace(decoder, norm_offset=False)
    if decoder.scale_embedding:  # into the table; a tied head keeps the table as it was
        if state:
            table = state["decoder.embedding.weight"]
            head = {"decoder.head.weight": table} if decoder.tied else {}
            state |= {"decoder.embedding.weight": table * torch.tensor(decoder.width**0.5, dtype=table.dtype), **head}
        decoder = replace(decoder, scale_embedding=False, tied=False)
    norm = QKNorm() if decoder.qk_norm is True else decoder.qk_norm
    decoder = replace(decoder, kv_heads=decoder.kv_heads or decoder.heads, head_dim=decoder.head_size, qk_norm=norm)
    return replace(cfg, image=image, fusion=fusion, decoder=decoder), state


def _two_layers(fusion: ProjectorConfig, state: dict[str, Tensor]) -> tuple[ProjectorConfig, dict[str, Tensor]]:
    """A linear map as two, the second of which changes nothing; a narrow layer with rows of zeros up to the width."""
    hidden, width = fusion.hidden or fusion.width, fusion.width
    if fusion.layers == 1:
        if state:
            state["fusion.layers.1.weight"] = torch.eye(width)
            if fusion.bias:
                state["fusion.layers.1.bias"] = torch.zeros(width)
        fusion = replace(fusion, layers=2, activation="none", hidden=width)
    elif fusion.layers == 2 and hidden <= width:  # every activation keeps a zero
        for name, dim in (("0.weight", 0), ("0.bias", 0), ("1.weight", 1)):
            if (key := f"fusion.layers.{name}") in state and hidden < width:
                old = state[key]
                rows = old.new_zeros([width - hidden if i == dim else n for i, n in enumerate(old.shape)])
                state[key] = torch.cat((old, rows), dim)
        fusion = replace(fusion, hidden=width)
    return fusion, state


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Every setting of ours that is another one there, by its dotted name."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        fields = [f.name for f in dataclasses.fields(ours)]
        return [told for f in fields for told in differences(getattr(ours, f), getattr(theirs, f), f"{where}.{f}")]
    if ours == theirs:
        return []
    kinds = [getattr(x, "kind", x) if dataclasses.is_dataclass(x) else x for x in (ours, theirs)]
    return [f"{where.removeprefix('.')} is {kinds[0]!r}, expected {kinds[1]!r}"]


# ------------------------------------------------------------------------------------------ configurations, as written

PUBLISHED_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


def _outer(cfg: VLMConfig) -> dict[str, Any]:
    """What a `config.json` of LLaVA says besides its two parts."""
    image, fusion = cfg.image, cfg.fusion
    assert isinstance(image, ViTConfig)
    projector = fusion if isinstance(fusion, ProjectorConfig) else ProjectorConfig(image.features, cfg.decoder.width)
    full = not image.class_token or image.keep_prefix
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "projector_hidden_act": PUBLISHED_ACTIVATIONS.get(projector.activation, projector.activation),
        "multimodal_projector_bias": projector.bias,
        "vision_feature_layer": list(image.layer) if isinstance(image.layer, tuple) else image.layer,
        "vision_feature_select_strategy": "full" if full else "default",
        "tie_word_embeddings": cfg.decoder.tied,
    }


def _vision(image: ViTConfig) -> dict[str, Any]:
    """CLIP's tower, or SigLIP's where there is no class token; its pooling head is not used, nor written."""
    return {
        "model_type": "clip_vision_model" if image.class_token else "siglip_vision_model",
        **({} if image.class_token else {"vision_use_head": False}),
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "num_channels": image.channels,
        "hidden_size": image.width,
        "num_hidden_layers": image.depth,
        "num_attention_heads": image.heads,
        "intermediate_size": image.mlp,
        "hidden_act": PUBLISHED_ACTIVATIONS.get(image.activation, image.activation),
        "layer_norm_eps": image.eps,
    }


def _text(cfg: DecoderConfig, kind: str, **more: Any) -> dict[str, Any]:
    """What the language classes of transformers have in common, in its layouts before and after version 5."""
    turned: dict[str, Any] = {"rope_type": "default"}
    if (scaling := cfg.rope_scaling) is not None:
        turned = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            turned |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
            turned |= {"original_max_position_embeddings": scaling.original}
    return {
        "model_type": kind,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads or cfg.heads,
        "head_dim": cfg.head_size,
        "intermediate_size": cfg.mlp,
        "hidden_act": PUBLISHED_ACTIVATIONS.get(cfg.activation, cfg.activation),
        "rms_norm_eps": cfg.eps,
        "max_position_embeddings": cfg.max_length,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **turned},
        **({} if cfg.rope_scaling is None else {"rope_scaling": turned}),
        "tie_word_embeddings": cfg.tied,
        **more,
    }


TEXTS: dict[str, Callable[[DecoderConfig], dict[str, Any]]] = {
    "llama": lambda cfg: _text(cfg, "llama", attention_bias=cfg.qkv_bias, mlp_bias=cfg.mlp_bias),
    "qwen2": lambda cfg: _text(cfg, "qwen2", use_sliding_window=False),
    "qwen3": lambda cfg: _text(cfg, "qwen3", attention_bias=cfg.qkv_bias, use_sliding_window=False),
    "mistral": lambda cfg: _text(cfg, "mistral", sliding_window=cfg.scores.window),
}


# ------------------------------------------------------------------------------------------------- the files beside it


def _pixels(found: object) -> dict[str, Any]:
    """A `preprocessor_config.json` for a picture pipeline that transformers has too."""
    sizes: dict[str, Any]
    if isinstance(found, Square):
        kind, sizes = "SiglipImageProcessor", {"size": {"height": found.size, "width": found.size}}
    elif isinstance(found, CenterCrop):
        crop: dict[str, Any] = {"crop_size": {"height": found.crop, "width": found.crop}, "do_center_crop": True}
        kind, sizes = "CLIPImageProcessor", {"size": {"shortest_edge": found.shortest}, **crop}
    elif isinstance(found, PadSquare):
        crop = {"crop_size": {"height": found.size, "width": found.size}, "do_center_crop": True}
        kind, sizes = "LlavaImageProcessor", {"size": {"shortest_edge": found.size}, **crop, "do_pad": True}
    else:
        name = getattr(found, "kind", type(found).__name__)
        raise ConfigError(f"it does not fit LLaVA's layout: pixels is {name!r}, expected one view of a picture")
    scaling: Scaling = found.scaling
    return {
        "image_processor_type": kind,
        "processor_class": "LlavaProcessor",
        **sizes,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": {"bilinear": 2, "bicubic": 3}[scaling.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(scaling.mean),
        "image_std": list(scaling.std),
    }


def _processor_config(c: Mapping[str, Any], name: str, image: ViTConfig) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": name,
        "patch_size": image.patch_size,
        "num_additional_image_tokens": image.prefix,
        "vision_feature_select_strategy": c["vision_feature_select_strategy"],
    }


def _tokenizer_config(tokenizer: Tokenizer, processor: Processor) -> dict[str, Any]:
    names = {f"{key}_token": getattr(tokenizer, key) for key in ("bos", "eos", "pad", "unk") if getattr(tokenizer, key)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "clean_up_tokenization_spaces": False,
        "model_max_length": processor.max_length,
        **names,
    }


def _image_token(processor: Processor) -> tuple[str, Tokenizer]:
    """The token that fills a picture's places, and the tokenizer that has it.

    Where a model borrows the one that words unknown to it become, engines that look for ids could not tell a picture
    from such a word: there a token is added.
    """
    tokenizer = processor.tokenizer
    name = next(name for name, index in tokenizer.controls.items() if index == processor.image_id)
    if name not in (tokenizer.unk, tokenizer.spec["model"].get("unk_token"), "<unk>"):
        return name, tokenizer
    if "<image>" in tokenizer.controls:
        return "<image>", tokenizer
    return "<image>", tokenizer.extended(("<image>",))


def _with_row(
    tensors: dict[str, Tensor], image: int, tokenizer: Tokenizer, cfg: DecoderConfig
) -> tuple[dict[str, Tensor], int]:
    """Tables that reach to the image token; a new row is that of the unknown word, so that it is never likelier."""
    missing = image + 1 - cfg.vocab_size
    if missing <= 0:
        return tensors, cfg.vocab_size
    row = tokenizer.controls.get(tokenizer.unk or "<unk>", 0)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:
            table = tensors[name]
            tensors[name] = torch.cat((table, table[row : row + 1].expand(missing, -1)))
    return tensors, cfg.vocab_size + missing


_WORDS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
)
_OURS = (
    "{{ '<bos>' }}{% for message in messages %}{% if message['content'] is not string %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ 'IMAGE' }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% for message in messages if message['role'] == 'system' %}" + _WORDS + "{% endfor %}"
    "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'user' %}"
    "{{ '<user>' }}" + _WORDS + "{% else %}"
    "{{ '<assistant>' }}{% generation %}{{ ' ' }}" + _WORDS + "{{ '<eos>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def _vicuna(system: str) -> str:
    """LLaVA's "v1", as `vicuna_template` writes it."""
    said = "{% for message in messages if message['role'] == 'system' %}" + _WORDS + "{{ ' ' }}{% endfor %}"
    default = "{% if messages | selectattr('role', 'equalto', 'system') | list | length == 0 %}"
    parts = (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
        "{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    return (
        "{{ '<s>' }}" + said + default + '{{ "' + system + '" }}{% endif %}'
        "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'user' %}"
        "{{ 'USER: ' }}" + parts + "{{ ' ASSISTANT:' }}{% else %}"
        "{% generation %}{{ ' ' }}" + _WORDS + "{{ '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
    )


JINJA = {"sightline": _OURS, "llava-v1": _vicuna(VICUNA_SYSTEM), "llava-hf": _vicuna("")}


def _jinja(processor: Processor) -> str:
    """The chat template of a model that came without one; IMAGE stands for the name of its image token."""
    name = next((name for name, template in TEMPLATES.items() if template is processor.template), None)
    if name not in JINJA:
        raise ConfigError(f"it does not fit LLaVA's layout: template is {name!r}, expected one of {', '.join(JINJA)}")
    return JINJA[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
