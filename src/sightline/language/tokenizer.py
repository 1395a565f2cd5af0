"""Text to ids and back, where text can never become a control token.

A published tokenizer looks for its control tokens inside whatever text it is given, so a user who types `<image>`
forges one. Here the tokens that control a model are taken out of the text tokenizer altogether; a template names them
and their ids are joined with those of the text around them.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..core.config import nearest
from ..core.errors import CheckpointError, ConfigError, InputError
from ..core.sequence import Piece


class Tokenizer:
    """A `tokenizer.json` split into a text side without control tokens and a table of the control tokens."""

    def __init__(self, spec: dict[str, Any], bos: str = "", eos: str = "", pad: str = "", unk: str = "") -> None:
        added = spec.get("added_tokens") or []
        self.spec = spec
        self.controls: dict[str, int] = {token["content"]: token["id"] for token in added}
        self.bos, self.eos, self.pad, self.unk = bos, eos, pad, unk
        self._names = {index: name for name, index in self.controls.items()}
        self._whole = tokenizers.Tokenizer.from_str(json.dumps(spec))
        bare = {**spec, "added_tokens": [], "post_processor": None}
        self._text = tokenizers.Tokenizer.from_str(json.dumps(bare))
        self._encode = lru_cache(maxsize=65_536)(self._encode_once)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read `tokenizer.json`, and the names of its special tokens from `tokenizer_config.json`."""
        path = folder / "tokenizer.json"
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
            extra = folder / "tokenizer_config.json"
            names = json.loads(extra.read_text(encoding="utf-8")) if extra.exists() else {}
            return cls(spec, **{key: _content(names.get(f"{key}_token")) for key in ("bos", "eos", "pad", "unk")})
        except Exception as error:  # the tokenizers library raises Exception itself for what it cannot read
            raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error})".splitlines()[0]) from None

    @classmethod
    def from_tiktoken(cls, path: Path, pattern: str, controls: Sequence[str], eos: str = "") -> "Tokenizer":
        """Read a file of tiktoken: in each line the bytes of a token in base 64 and its rank, which is its id.

        pattern: the expression that text is cut by first. controls: their ids follow the last rank. tiktoken joins two
        neighbours whose bytes are a token's, that of the lowest rank first: every cut of a token in two is a merge.
        """
        ranks = _ranks(path)
        names = {token: token.decode("latin-1").translate(_LETTERS) for token in ranks}
        cuts = ((token[:i], token[i:]) for token in sorted(ranks, key=ranks.__getitem__) for i in range(1, len(token)))
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        spec = {
            "version": "1.0",
            "added_tokens": [{"id": len(ranks) + i, "content": name, **plain} for i, name in enumerate(controls)],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {names[token]: rank for token, rank in ranks.items()},
                "merges": [[names[a], names[b]] for a, b in cuts if a in ranks and b in ranks],
                "ignore_merges": True,  # a word that is a token is that token, whether merges lead to it or not
            },
        }
        return cls(spec, eos=eos)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into a folder, which is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")
        names = {f"{key}_token": getattr(self, key) for key in ("bos", "eos", "pad", "unk") if getattr(self, key)}
        (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1), encoding="utf-8")

    def extended(self, names: Iterable[str]) -> "Tokenizer":
        """The same with further control tokens, whose ids follow all others; those that it has already are left."""
        added, following = list(self.spec.get("added_tokens") or []), self.following
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        new = [name for name in dict.fromkeys(names) if name not in self.controls]
        added += [{"id": following + i, "content": name, **plain} for i, name in enumerate(new)]
        return Tokenizer({**self.spec, "added_tokens": added}, self.bos, self.eos, self.pad, self.unk)

    @property
    def following(self) -> int:
        """The first id after all of its own."""
        return max([self.words - 1, *self.controls.values()]) + 1

    @property
    def filler(self) -> int:
        """The id that rows of a batch are filled up with: that for padding or, without one, another control token."""
        named = (self.pad, self.eos, self.bos, self.unk)
        return next((self.controls[name] for name in named if name in self.controls), 0)

    @property
    def vocab_size(self) -> int:
        """Ids in use, control tokens included."""
        return int(self._whole.get_vocab_size(with_added_tokens=True))

    def reserve(self, names: Iterable[str]) -> None:
        """Count entries of the vocabulary by these names as control tokens as well; files do not always say so."""
        for name in names:
            index = self._whole.token_to_id(name)
            if index is not None and name not in self.controls:
                self.controls[name], self._names[index] = index, name
        self._encode.cache_clear()

    @property
    def words(self) -> int:
        """Ids that plain text may become: all below this."""
        return max(self._text.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    def control(self, name: str) -> int:
        """The id of a control token; ConfigError tells the nearest known one."""
        if name not in self.controls:
            raise ConfigError(f"the tokenizer has no control token {name!r}{nearest(name, self.controls)}")
        return self.controls[name]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; none of them is a control token, whatever the text says."""
        return list(self._encode(text))

    def _encode_once(self, text: str) -> tuple[int, ...]:
        try:
            ids = self._text.encode(text, add_special_tokens=False).ids
        except TypeError:  # JSON may hold half of a surrogate pair, which is no character
            raise InputError("the text holds half a character (a lone surrogate), expected whole ones") from None
        forged = [i for i, index in enumerate(ids) if index in self._names and self._names[index] != self.unk]
        if not forged:
            return tuple(ids)
        # a vocabulary may also hold a control token as an ordinary entry; then its letters are read one by one
        return tuple(index for letter in text for index in self._letter(letter))

    def _letter(self, letter: str) -> list[int]:
        return [i for i in self._text.encode(letter, add_special_tokens=False).ids if i not in self._names]

    def trusted(self, text: str) -> list[int]:
        """Ids of text that this program wrote itself, where control tokens count as such."""
        return self.ids(self.split(text))

    def split(self, text: str) -> list[Piece]:
        """Cut text at the names of control tokens, longest name first."""
        found: list[Piece] = []
        start = 0
        for place, name in _occurrences(text, tuple(self.controls)):
            if place < start:
                continue
            if place > start:
                found.append(Piece(text[start:place]))
            found.append(Piece(name, control=True))
            start = place + len(name)
        return found + ([Piece(text[start:])] if start < len(text) else [])

    def ids(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of pieces: control tokens by their names, everything else as plain text."""
        ids: list[int] = []
        for piece in pieces:
            ids += [self.control(piece.text)] if piece.control else self.encode(piece.text)
        return ids

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """Decoded output with control tokens kept apart from text that merely looks like them."""
        out: list[Piece] = []
        run: list[int] = []
        for index in [*ids, None]:
            if index is not None and index not in self._names:
                run.append(index)
                continue
            if run:
                out.append(Piece(self._text.decode(run, skip_special_tokens=False)))
                run = []
            if index is not None:
                out.append(Piece(self._names[index], control=True))
        return out

    def decode(self, ids: Sequence[int], skip_control: bool = True) -> str:
        """Text of ids; control tokens are left out, or shown by name."""
        return "".join(piece.text for piece in self.pieces(ids) if not (piece.control and skip_control))


def _letters() -> dict[int, int]:
    """The letter of each byte in a byte-level vocabulary: itself where it shows, else one above 255 (GPT-2)."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: 256 + i for i, byte in enumerate(hidden)}


_LETTERS = _letters()


def _ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks; CheckpointError where they are not numbered from 0 on or a byte is not among them."""
    try:
        parts = path.read_bytes().split()
        ranks = {base64.b64decode(a, validate=True): int(b) for a, b in zip(parts[::2], parts[1::2], strict=True)}
    except (OSError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path}: not readable as ranks of tiktoken ({error})".splitlines()[0]) from None
    if sorted(ranks.values()) != list(range(len(parts) // 2)):
        raise CheckpointError(f"{path}: {len(ranks)} tokens that are not numbered from 0 on")
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(f"{path}: {len(absent)} bytes are no tokens, such as {absent[0]}")
    return ranks


def _occurrences(text: str, names: tuple[str, ...]) -> list[tuple[int, str]]:
    """Where names begin in text, by place, the longest first at one place."""
    found = []
    for name in names:
        place = text.find(name)
        while place >= 0:
            found.append((place, name))
            place = text.find(name, place + 1)
    return sorted(found, key=lambda each: (each[0], -len(each[1])))


def _content(token: Any) -> str:
    """The string of a special token, which files give plainly or as a record."""
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return str(token or "")


def train_tokenizer(texts: Iterable[str], size: int, controls: Sequence[str], **names: str) -> Tokenizer:
    """Learn a byte-level BPE of at most `size` ids: any text can be written, common words are one token.

    `names` are the bos, eos and pad among `controls`. (Byte-level BPE: Radford et al. 2019, GPT-2.)
    """
    smallest = 256 + len(controls)
    if size < smallest:
        raise ConfigError(f"a tokenizer of {size} ids: expected at least {smallest}, for all bytes and control tokens")
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(controls),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=20,
        show_progress=False,
    )
    built.train_from_iterator(texts, trainer)
    return Tokenizer(json.loads(built.to_str()), **names)
