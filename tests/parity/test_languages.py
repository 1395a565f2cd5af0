"""Language models of every family against transformers, through their published names."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from published_folders import TEXT, randomised as drawn, saved, write
from torch import Tensor, nn

from sightline.core.errors import ConfigError
from sightline.layers import native
from sightline.zoo.published import Published, load_published

CLOSE = {"atol": 1e-4, "rtol": 0.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0}
KOSMOS = {"embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 48, "vocab_size": 99, "pad_token_id": 1}
MPT = {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 99, "max_seq_len": 256, "eos_token_id": None}
LLAMA4 = {"num_hidden_layers": 4, "num_local_experts": 4, "head_dim": 8, "attention_chunk_size": 8}
LLAMA4 |= {"intermediate_size_mlp": 40, "floor_scale": 4}
ARIA = {"moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 2}
GEMMA2 = {"num_hidden_layers": 3, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}


def randomised(model: nn.Module) -> Any:
    """Every parameter drawn anew, and so large that attention looks at few tokens and far ones count."""
    made = drawn(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2.5)
    return made


def llama4(**more: Any) -> Any:
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**{**TEXT, **LLAMA4, **more}))


def llama(**more: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **more))


def scaled(**more: Any) -> Any:
    return llama(rope_parameters={"rope_theta": 1e4, **more})


def opt(**more: Any) -> Any:
    sizes = {key: value for key, value in TEXT.items() if key not in ("intermediate_size", "num_key_value_heads")}
    return hf.OPTForCausalLM(hf.OPTConfig(**{**sizes, **OPT, **more}))


def persimmon(**more: Any) -> Any:
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return hf.PersimmonForCausalLM(hf.PersimmonConfig(**sizes, **more))


def gpt_neox(**more: Any) -> Any:
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, use_parallel_residual=False, **more))


MODELS: dict[str, Callable[[], Any]] = {
    "llama-3": lambda: scaled(**LLAMA3, original_max_position_embeddings=16),
    "llama-linear": lambda: scaled(rope_type="linear", factor=4.0),
    "llama-mlp-bias": lambda: llama(mlp_bias=True),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**TEXT, sliding_window=None)),
    "mistral-window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**TEXT, sliding_window=6)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=5)),
    "opt": opt,
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**{**TEXT, **GEMMA2, **CAPS})),
    "aria": lambda: hf.AriaTextForCausalLM(hf.AriaTextConfig(**TEXT, **ARIA)),
    "llama4": llama4,
    "llama4-dense": lambda: llama4(interleave_moe_layer_step=2, use_qk_norm=False, attn_temperature_tuning=False),
    "kosmos-2": lambda: hf.models.kosmos2.modeling_kosmos2.Kosmos2TextForCausalLM(
        hf.models.kosmos2.configuration_kosmos2.Kosmos2TextConfig(**KOSMOS)
    ),
    "persimmon": persimmon,
    "persimmon-plain": lambda: persimmon(qk_layernorm=False, rope_parameters={"rope_theta": 25_000.0}),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(**MPT)),
    "gpt-neox": gpt_neox,
    "gpt-neox-all-turned": lambda: gpt_neox(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 1.0}),
    "mpt-6-heads": lambda: hf.MptForCausalLM(hf.MptConfig(**{**MPT, "n_heads": 6, "d_model": 48})),
}


def words(length: int = 20, rows: int = 2) -> Tensor:
    return torch.randint(3, 98, (rows, length), generator=torch.Generator().manual_seed(3))


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(params=["kernels", "torch alone"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with the built kernels even for tiny models: what they do not know they must leave to torch."""
    if request.param == "kernels" and native.library() is None:
        pytest.skip("no compiler on this machine")
    monkeypatch.setattr(native, "WORTH", 0 if request.param == "kernels" else 1 << 60)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens(tmp_path: Path, name: str, kernels: None) -> None:
    theirs = randomised(MODELS[name]())
    ours = load_published(saved(theirs, tmp_path))
    ids = words()
    torch.testing.assert_close(ours.logits(input_ids=ids), logits(theirs, input_ids=ids), **CLOSE)
    with torch.no_grad():
        greedy = theirs.generate(input_ids=ids, max_new_tokens=32, do_sample=False)[:, 20:]
    assert torch.equal(ours.generate_ids(input_ids=ids, max_new_tokens=32), greedy)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("llama4")])
def test_left_padding(tmp_path: Path, name: str) -> None:
    theirs = randomised(MODELS[name]())
    ours = load_published(saved(theirs, tmp_path))
    ids = words()
    mask = torch.ones_like(ids)
    ids[0, :7], mask[0, :7] = 1 if name == "kosmos-2" else 0, 0
    got, wanted = ours.logits(input_ids=ids, attention_mask=mask), logits(theirs, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], **CLOSE)


def test_llama4_with_left_padding_is_the_row_alone(tmp_path: Path) -> None:
    """transformers counts temperatures from the padding on, so that its rows differ from themselves alone."""
    ours = load_published(saved(randomised(llama4()), tmp_path))
    ids = words()
    mask = torch.ones_like(ids)
    ids[0, :7], mask[0, :7] = 0, 0
    together = ours.logits(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(together[0, 7:], ours.logits(input_ids=ids[:1, 7:])[0], **CLOSE)
    torch.testing.assert_close(together[1], ours.logits(input_ids=ids[1:])[0], **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_what_we_save_loads_in_transformers(tmp_path: Path, name: str) -> None:
    theirs = randomised(MODELS[name]())
    load_published(saved(theirs, tmp_path / "theirs")).save(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits(again, input_ids=words()), logits(theirs, input_ids=words()))


@pytest.mark.parametrize("length", [20, 40])
def test_a_base_that_grows_with_the_text(tmp_path: Path, length: int) -> None:
    theirs = randomised(
        hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **{**TEXT, "max_position_embeddings": 32},
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            )
        )
    )
    ours = load_published(saved(theirs, tmp_path))
    ids = words(length)
    torch.testing.assert_close(ours.logits(input_ids=ids), logits(theirs, input_ids=ids), **CLOSE)
    with torch.no_grad():
        greedy = theirs.generate(input_ids=ids, max_new_tokens=24, do_sample=False)[:, length:]
    assert torch.equal(ours.generate_ids(input_ids=ids, max_new_tokens=24), greedy)


def test_unknown_rotary_positions_are_refused(tmp_path: Path) -> None:
    config = {**TEXT, "model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 4.0}}
    with pytest.raises(ConfigError, match="rotary positions of kind 'yarn', expected one of 'default', 'linear'"):
        load_published(write(tmp_path, config, {"x": torch.zeros(1)}))


@pytest.mark.parametrize(
    "config, wrong",
    [
        ({"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before is False, expected True"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"] * 26}, "layer_types is"),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, "alibi is False, expected True"),
        ({"model_type": "llama4_text", "moe_layers": [1]}, "moe_layers is"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True, expected False"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, config: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        load_published(write(tmp_path, config, {"x": torch.zeros(1)}))


# ------------------------------------------------------------------------------------------- published in other layouts


def test_mixtral_is_published_expert_by_expert(tmp_path: Path) -> None:
    theirs = randomised(MODELS["mixtral"]())
    tensors: dict[str, Tensor] = {}
    for key, value in theirs.state_dict().items():
        layer = key.rpartition(".mlp.")[0]
        if "gate_up_proj" in key:
            for n, expert in enumerate(value):
                gate, up = expert.chunk(2)
                tensors |= {
                    f"{layer}.block_sparse_moe.experts.{n}.{w}.weight": x for w, x in (("w1", gate), ("w3", up))
                }
        elif "experts.down_proj" in key:
            tensors |= {f"{layer}.block_sparse_moe.experts.{n}.w2.weight": x for n, x in enumerate(value)}
        else:
            tensors[key.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = value
    ours = load_published(write(tmp_path, theirs.config.to_dict(), tensors))
    torch.testing.assert_close(ours.logits(input_ids=words()), logits(theirs, input_ids=words()), **CLOSE)


INTERNLM2 = {"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
INTERNLM2 |= {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
}
INTERNLM2 |= {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output"}


def renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    out = {}
    for key, value in tensors.items():
        for old, new in names.items():
            key = key.replace(old, new)
        out[key] = value
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_internlm2_packs_group_by_group(tmp_path: Path, kv_heads: int) -> None:
    theirs = randomised(hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, "num_key_value_heads": kv_heads})))
    tensors = renamed(dict(theirs.state_dict()), INTERNLM2)
    for layer in ("model.layers.0.", "model.layers.1."):
        q, k, v = (tensors.pop(f"{layer}self_attn.{x}_proj.weight") for x in "qkv")
        group = 4 // kv_heads
        heads = q.view(kv_heads, group * 8, 32), k.view(kv_heads, 8, 32), v.view(kv_heads, 8, 32)
        tensors[f"{layer}attention.wqkv.weight"] = torch.cat(heads, dim=1).flatten(0, 1)
    config = {**TEXT, "num_key_value_heads": kv_heads, "model_type": "internlm2", "bias": False}
    ours = load_published(write(tmp_path, config, tensors))
    torch.testing.assert_close(ours.logits(input_ids=words()), logits(theirs, input_ids=words()), **CLOSE)
    ours.save(tmp_path / "ours")
    again = load_published(tmp_path / "ours")
    assert torch.equal(again.logits(input_ids=words()), ours.logits(input_ids=words()))


QWEN = {"model.layers.": "transformer.h.", "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f"}
QWEN |= {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj"}
QWEN |= {"mlp.gate_proj": "mlp.w2", "mlp.up_proj": "mlp.w1", "mlp.down_proj": "mlp.c_proj"}


def qwen(theirs: Any) -> dict[str, Tensor]:
    """The names of Qwen."""
    tensors = renamed(dict(theirs.state_dict()), QWEN)
    for n in range(2):
        for part in ("weight", "bias"):
            packed = [tensors.pop(f"transformer.h.{n}.self_attn.{x}_proj.{part}") for x in "qkv"]
            tensors[f"transformer.h.{n}.attn.c_attn.{part}"] = torch.cat(packed)
    return tensors


QWEN_CONFIG = {"model_type": "qwen", "kv_channels": 8, "layer_norm_epsilon": 1e-6, "seq_length": 32, "no_bias": True}
QWEN_CONFIG |= {**TEXT, "intermediate_size": 96}


def test_qwen_is_qwen2_within_its_length(tmp_path: Path) -> None:
    theirs = randomised(hf.Qwen2ForCausalLM(hf.Qwen2Config(**{**TEXT, "num_key_value_heads": 4})))
    ours = load_published(write(tmp_path, QWEN_CONFIG, qwen(theirs)))
    ids = words(32)
    torch.testing.assert_close(ours.logits(input_ids=ids), logits(theirs, input_ids=ids), **CLOSE)
    longer = words(40)
    assert float((ours.logits(input_ids=longer) - logits(theirs, input_ids=longer)).abs().max()) > 1e-2


@pytest.mark.parametrize("swin", [False, True])
def test_chameleon(tmp_path: Path, swin: bool) -> None:
    names = {"<image>": 4, "a": 5, **{f"IMGIMG{chr(65 + n)}Z": 90 + n for n in range(4)}}
    pictures = {"embed_dim": 8, "num_embeddings": 4, "base_channels": 32, "channel_multiplier": [1], "resolution": 32}
    pictures |= {"latent_channels": 8, "num_res_blocks": 1}
    sizes = {**TEXT, "vocabulary_map": names, "vq_config": pictures, "swin_norm": swin}
    theirs = randomised(hf.ChameleonForConditionalGeneration(hf.ChameleonConfig(**sizes)))
    ours = load_published(saved(theirs, tmp_path))
    ids = torch.randint(3, 80, (2, 20))
    shown = torch.tensor([n for n in range(99) if not 90 <= n < 94])  # scores of the pictures' words are hidden there
    got, wanted = ours.logits(input_ids=ids), logits(theirs, input_ids=ids)
    torch.testing.assert_close(got[..., shown], wanted[..., shown], **CLOSE)


# ------------------------------------------------------------------------------------------------------------------ T5

T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "eos_token_id": None}
T5 |= {"decoder_start_token_id": 0}


def t5(tied: bool) -> Any:
    kind = "relu" if tied else "gated-gelu"
    model = hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj=kind, tie_word_embeddings=tied))
    if not tied:  # transformers 5 ties them until a file tells otherwise
        model.lm_head.weight = nn.Parameter(torch.zeros(99, 32))
    return randomised(model)


def t5_pair(folder: Path, tied: bool) -> tuple[Any, Published]:
    theirs = t5(tied)
    return theirs, load_published(saved(theirs, folder))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_t5(tmp_path: Path, tied: bool, padded: bool) -> None:
    theirs, ours = t5_pair(tmp_path, tied)
    ids, written = words(40), words(30)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 33:] = 0
    wanted = logits(theirs, input_ids=ids, attention_mask=mask, decoder_input_ids=written)
    got = ours.logits(input_ids=ids, attention_mask=mask, decoder_input_ids=written)
    torch.testing.assert_close(got, wanted, **CLOSE)
    with torch.no_grad():
        settings = {"max_new_tokens": 30, "do_sample": False, "use_cache": False}  # whose cache knows one depth only
        greedy = theirs.generate(input_ids=ids, attention_mask=mask, **settings)[:, 1:]
    assert torch.equal(ours.generate_ids(input_ids=ids, attention_mask=mask, max_new_tokens=30), greedy)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_t5_loads_in_transformers(tmp_path: Path, tied: bool) -> None:
    theirs, ours = t5_pair(tmp_path / "theirs", tied)
    ours.save(tmp_path / "ours")
    again = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    inputs = {"input_ids": words(), "decoder_input_ids": words(6)}
    assert math.isfinite(float(logits(again, **inputs).sum()))
    assert torch.equal(logits(again, **inputs), logits(theirs, **inputs))
