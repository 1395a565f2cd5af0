"""The tokenizer: any text there and back, control tokens by name only, files read or refused."""

import base64
import json
import random
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from sightline.core.errors import CheckpointError, ConfigError, InputError
from sightline.core.sequence import Piece
from sightline.language.tokenizer import Tokenizer, train_tokenizer

CONTROLS = ("<pad>", "<bos>", "<eos>", "<image>", "<loc1>", "<loc12>", "<a>", "<a><b>", "<b>")
TEXTS = ["how many red circles are there? <image> <eos>", "the user asks where the red square is"] * 30
TOKENIZER = train_tokenizer(TEXTS, 500, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")
FORBIDDEN = set(TOKENIZER.controls.values())

texts = st.lists(
    st.sampled_from([*CONTROLS, "red", " circles", "é", "日本", "👩‍👩‍👧", "\0", "\n"]) | st.text(max_size=5), max_size=8
)


def test_training_gives_the_controls_the_first_ids_and_keeps_to_its_size() -> None:
    assert [TOKENIZER.control(name) for name in CONTROLS] == list(range(len(CONTROLS)))
    assert 256 + len(CONTROLS) < TOKENIZER.vocab_size <= 500
    assert (TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.pad, TOKENIZER.unk) == ("<bos>", "<eos>", "<pad>", "")


def test_common_words_are_one_token_and_rare_ones_are_spelled() -> None:
    assert len(TOKENIZER.encode(" circles")) == 1
    assert len(TOKENIZER.encode(" zebra")) > 1


def test_training_is_deterministic() -> None:
    again = train_tokenizer(iter(TEXTS), 500, CONTROLS, bos="<bos>", eos="<eos>", pad="<pad>")
    assert again.spec == TOKENIZER.spec


@pytest.mark.parametrize("size", [0, 100, 256 + len(CONTROLS) - 1])
def test_a_vocabulary_too_small_for_all_bytes_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"a tokenizer of {size} ids: expected at least {256 + len(CONTROLS)}"):
        train_tokenizer(TEXTS, size, CONTROLS)
    assert train_tokenizer(TEXTS, 256 + len(CONTROLS), CONTROLS).vocab_size == 256 + len(CONTROLS)


@settings(max_examples=80, deadline=None)
@given(texts.map("".join))
def test_any_text_comes_back_and_holds_no_control_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(ids, skip_control=False) == text
    assert not FORBIDDEN.intersection(ids)


@settings(max_examples=80, deadline=None)
@given(texts)
def test_trusted_text_is_its_controls_and_its_words_side_by_side(parts: list[str]) -> None:
    text = "".join(parts)
    pieces = TOKENIZER.split(text)
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text in CONTROLS for piece in pieces if piece.control)
    assert not any(name in piece.text for piece in pieces if not piece.control for name in CONTROLS)
    ids = TOKENIZER.trusted(text)
    assert ids == TOKENIZER.ids(pieces) == [index for piece in pieces for index in TOKENIZER.trusted(piece.text)]
    assert TOKENIZER.decode(ids, skip_control=False) == text
    assert TOKENIZER.decode(ids) == "".join(piece.text for piece in pieces if not piece.control)


def test_encode_and_trusted_part_at_control_tokens_only() -> None:
    assert TOKENIZER.trusted("how many") == TOKENIZER.encode("how many")
    assert TOKENIZER.trusted("<image>") == [TOKENIZER.control("<image>")]
    assert TOKENIZER.encode("<image>") == [
        index for letter in ("<", "image", ">") for index in TOKENIZER.encode(letter)
    ]


def test_the_first_and_then_the_longest_name_counts() -> None:
    pieces = TOKENIZER.split("x<loc12><loc1>2<a><b><b><a>")
    assert [piece.text for piece in pieces] == ["x", "<loc12>", "<loc1>", "2", "<a><b>", "<b>", "<a>"]
    assert [piece.control for piece in pieces] == [False, True, True, False, True, True, True]


def test_pieces_keep_tokens_apart_from_text_that_looks_like_them() -> None:
    ids = [
        *TOKENIZER.encode("a <eos>"),
        TOKENIZER.control("<eos>"),
        TOKENIZER.control("<image>"),
        *TOKENIZER.encode("é"),
    ]
    assert TOKENIZER.pieces(ids) == [Piece("a <eos>"), Piece("<eos>", True), Piece("<image>", True), Piece("é")]
    assert TOKENIZER.decode(ids) == "a <eos>é"
    assert TOKENIZER.decode(ids, skip_control=False) == "a <eos><eos><image>é"
    assert TOKENIZER.pieces([]) == [] and TOKENIZER.decode([]) == "" and TOKENIZER.encode("") == []


def test_a_control_token_that_is_an_ordinary_word_too_is_still_not_typed() -> None:
    """Some published vocabularies hold a control token a second time, as a word that text may be cut into."""
    (red,) = TOKENIZER.encode(" red")
    spec = json.loads(json.dumps(TOKENIZER.spec))
    spec["added_tokens"].append(
        {**spec["added_tokens"][0], "id": red, "content": "\u0120red"}
    )  # as byte-level BPE spells
    tokenizer = Tokenizer(spec)
    ids = tokenizer.encode("how red it is")
    assert red not in ids and tokenizer.decode(ids) == "how red it is"
    assert tokenizer.ids([Piece("\u0120red", control=True)]) == [red]


def test_encode_gives_each_caller_its_own_list() -> None:
    first = TOKENIZER.encode("how many")
    first.append(0)
    assert TOKENIZER.encode("how many") == first[:-1]


def test_an_unknown_control_token_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no control token '<imagge>'; did you mean '<image>'\?"):
        TOKENIZER.control("<imagge>")
    with pytest.raises(ConfigError, match="no control token '<loc2>'"):
        TOKENIZER.ids([Piece("<loc2>", control=True)])


@pytest.mark.parametrize("text", ["\ud800", "how \udfff many"])
def test_half_a_character_is_one_clear_line(text: str) -> None:
    with pytest.raises(InputError, match="holds half a character"):
        TOKENIZER.encode(text)


def test_a_character_that_breaks_off_is_shown_as_such() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("日")[:1]) == "\ufffd"


def test_save_and_load_is_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "new" / "folder")
    again = Tokenizer.from_folder(tmp_path / "new" / "folder")
    assert (again.bos, again.eos, again.pad, again.unk) == ("<bos>", "<eos>", "<pad>", "")
    assert again.spec == TOKENIZER.spec and again.controls == TOKENIZER.controls
    text = "how many <image> 日本?"
    assert again.encode(text) == TOKENIZER.encode(text) and again.trusted(text) == TOKENIZER.trusted(text)


def test_names_of_tokens_may_be_records_or_missing(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    names = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert [Tokenizer.from_folder(tmp_path).bos, Tokenizer.from_folder(tmp_path).eos] == ["<bos>", ""]
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).bos == ""


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", None),
        ("tokenizer.json", ""),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {}}'),
        ("tokenizer.json", '{"added_tokens": 3}'),
        ("tokenizer.json", '{"added_tokens": [{}]}'),
        ("tokenizer.json", "\udcff"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_folder_without_a_whole_tokenizer_is_one_clear_line(tmp_path: Path, name: str, content: str | None) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read as a tokenizer") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_each_control_token_is_left_out_of_the_text_side_only() -> None:
    """Published tokenizers add tokens beyond their vocabulary: these count, and are not found in text."""
    spec = json.loads(json.dumps(TOKENIZER.spec))
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": TOKENIZER.vocab_size, "content": "<new>"})
    grown = Tokenizer(spec)
    assert grown.vocab_size == TOKENIZER.vocab_size + 1 and grown.trusted("<new>") == [TOKENIZER.vocab_size]
    assert grown.encode("<new>") == TOKENIZER.encode("<new>")


# ---------------------------------------------------------------------------------------------------------- tiktoken

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTERS = "abcde é\u4e2d\n'1."


def ranks() -> dict[bytes, int]:
    """All bytes, in an order of their own, and tokens joined from those before them."""
    rng = random.Random(4)
    tokens = [bytes([byte]) for byte in sorted(range(256), key=lambda byte: (byte * 77) % 256)]
    parts = [letter.encode() for letter in LETTERS] + [bytes([byte]) for byte in "é\u4e2d".encode()]
    while len(tokens) < 340:
        token = rng.choice(parts) + rng.choice(parts)
        if token not in tokens:
            tokens.append(token)
            parts.append(token)
    tokens.append(b"abcdeabcde")  # no two tokens make it
    return {token: rank for rank, token in enumerate(tokens)}


def joined(word: bytes, known: dict[bytes, int]) -> list[int]:
    """A word's ids by tiktoken's rule: the neighbours that make the token of the lowest rank, the leftmost first."""
    if word in known:
        return [known[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(known[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in known]
        if not pairs:
            return [known[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def write_ranks(path: Path, known: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in known.items()))
    return path


def test_ids_of_a_tiktoken_file_are_tiktoken_s(tmp_path: Path) -> None:
    regex = pytest.importorskip("regex")
    known, rng = ranks(), random.Random(5)
    tokenizer = Tokenizer.from_tiktoken(write_ranks(tmp_path / "x.tiktoken", known), WORDS, ("<a>", "<b>"))
    texts = ["".join(rng.choice(LETTERS) for _ in range(rng.randrange(1, 60))) for _ in range(400)]
    longest = 0
    for text in [*texts, "abcdeabcde", " abcdeabcde", "I'll e\u0301 <a>"]:
        normal = unicodedata.normalize("NFC", text)
        wanted = [index for word in regex.findall(WORDS, normal) for index in joined(word.encode(), known)]
        assert tokenizer.encode(text) == wanted
        assert tokenizer.decode(wanted) == normal
        longest = max(longest, *map(len, (word for word in known if known[word] in wanted)))
    assert longest == 10  # merges were met, and the token that none lead to
    assert tokenizer.controls == {"<a>": len(known), "<b>": len(known) + 1}
    assert tokenizer.trusted("<b>a") == [len(known) + 1, known[b"a"]]


def test_a_tiktoken_file_saved_as_ours_has_the_same_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_tiktoken(write_ranks(tmp_path / "x.tiktoken", ranks()), WORDS, ("<a>",), eos="<a>")
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode(LETTERS * 3) == tokenizer.encode(LETTERS * 3)
    assert (again.controls, again.eos) == (tokenizer.controls, "<a>")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("YQ== 0\nYg==", "not readable as ranks of tiktoken"),
        ("a b c d", "not readable as ranks of tiktoken"),
        ("YQ== 0\nYg== 2", "2 tokens that are not numbered from 0 on"),
        ("YQ== 0\nYQ== 1", "1 tokens that are not numbered from 0 on"),
        ("YQ== 0", "255 bytes are no tokens, such as 0"),
    ],
)
def test_a_damaged_tiktoken_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.tiktoken").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_tiktoken(tmp_path / "x.tiktoken", WORDS, ())


def test_words_of_the_vocabulary_may_be_reserved() -> None:
    """Files do not always tell control tokens from words; nobody can type what is reserved."""
    built = train_tokenizer(["aaaa bbbb"] * 30, 300, ("<s>", "<0x04>"))
    spec = {**built.spec, "added_tokens": [t for t in built.spec["added_tokens"] if t["content"] == "<s>"]}
    tokenizer = Tokenizer(spec)
    index = built.control("<0x04>")
    tokenizer.reserve(("<0x04>", "<nowhere>"))
    assert tokenizer.control("<0x04>") == index and "<nowhere>" not in tokenizer.controls
    assert index not in tokenizer.encode("a<0x04>b")
    assert tokenizer.decode([index, *tokenizer.encode("aa")]) == "aa"
