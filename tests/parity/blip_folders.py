"""Tiny folders of BLIP-2 and InstructBLIP with random weights and all files that their processors need."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sightline.language.tokenizer import Tokenizer, train_tokenizer
from sightline.zoo.checkpoint import write
from sightline.zoo.families import FAMILIES

KINDS = ("blip-2 opt", "blip-2 t5", "instructblip llama", "instructblip t5")
QUERIES, SIDE, VOCABULARY = 5, 28, 400
TEXTS = ["Question: how many red circles are there? Answer: two. What is in the picture? a blue square"] * 30
CONTROLS = ("<pad>", "</s>", "<unk>", "<image>")
NAMES = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": SIDE, "patch_size": 7}
QFORMER = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
QFORMER |= {"max_position_embeddings": 40}
WORDS = {
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "max_position_embeddings": 120},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 120},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
}
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def blip_folder(folder: Path, kind: str) -> Path:
    """A folder of this kind; pictures and questions change what it answers."""
    family, text = kind.split()
    words = {"model_type": text, "vocab_size": VOCABULARY, "num_attention_heads": 4, **WORDS[text]}
    if text == "t5":
        words |= {"tie_word_embeddings": False, "decoder_start_token_id": 0}
    c: dict[str, Any] = {"model_type": family, "vision_config": VISION, "num_query_tokens": QUERIES}
    c |= {"qformer_config": {**QFORMER, "vocab_size": 120}, "text_config": words, "image_token_index": 3}
    made, generator = FAMILIES[family].build(c, folder), torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(t.shape, generator=generator) * 0.5 for name, t in made.state_dict().items()}
    write(folder, FAMILIES[family].keys(made.config).save(tensors), c)
    around = {"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    write_tokenizer(folder, text, around)
    picture = {"size": {"height": SIDE, "width": SIDE}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(picture))
    if family == "instructblip":
        write_bert(folder / "qformer_tokenizer")
    return folder


def write_tokenizer(folder: Path, text: str, around: tuple[Any, Any]) -> None:
    """OPT's and Vicuna's put a token before the words; T5's, which knows pieces of words by their odds, after them."""
    if text == "t5":
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
        made.decoder = decoders.Metaspace()
        made.train_from_iterator(
            TEXTS, trainers.UnigramTrainer(vocab_size=80, special_tokens=list(CONTROLS), unk_token="<unk>")
        )
        spec = json.loads(made.to_str())
    else:
        spec = train_tokenizer(TEXTS, VOCABULARY, CONTROLS).spec
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": list(around[::-1] if text == "t5" else around),
        "pair": [],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    names = {k.removesuffix("_token"): v for k, v in NAMES.items() if not (text == "t5" and k == "bos_token")}
    Tokenizer(spec, **names).save(folder)


def write_bert(folder: Path) -> None:
    """Letters and their continuations as BERT's words."""
    letters = [chr(i) for i in range(97, 123)]
    entries = [*BERT, "?", ".", ":", *letters, *(f"##{letter}" for letter in letters), "how", "many", "red"]
    made = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(entries)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(list(BERT))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
