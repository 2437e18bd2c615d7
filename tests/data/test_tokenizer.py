"""Tokenizers give every text back, and cut it where its ids stay the same.

What looks like a special token is text to them, and transformers loads them.
"""

import json
import os
import random
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from dist_lm.data import tokenizer as tokenizer_module
from dist_lm.data.prepared.encode import SEPARATOR, serve
from dist_lm.data.tokenizer import EOT, StreamDecoder, Tokenizer, load_tokenizer
from dist_lm.data.tokenizer_training import (
    UNK,
    few_words,
    is_trained_spec,
    sample,
    train_tokenizer,
)
from dist_lm.errors import UserError

CORPUS = [
    "Hello world, it's the 21st century;\n\n  we've 1234567 reasons!!!  "
    "\tfoo_bar = {'a': [1, 2.5e-3]}\r\n",
    "Ünïcödé 世界。你好,世界 🙂🙃 e\u0301 naïve ﬁne \u3000x\n    indented\n        more\n",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ODD = ["\r\n", "\u3000", "\u0301", "ﬁ", "İ"]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [*"\n\t_é。🙂 ", "  ", "\n\n", "'s", "'ll", ". ", ".\n", "1234567", "世界"]
        ),
        st.sampled_from(["hello world", "hello world "]),
        st.sampled_from(["hello", "Hello", " world", "it", "foo", "!!!", "x" * 40, *ODD]),
        st.text(st.characters(codec="utf-8"), max_size=6),
    ),
    max_size=60,
).map("".join)


def foreign(
    model: Any,
    trainer: Any,
    pre_tokenizer: Any = None,
    normalizer: Any = None,
    decoder: Any = None,
    added: Any = (),
) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens(list(added))
    return Tokenizer(tokenizer.to_str(), EOT)


def make(kind: str) -> Tokenizer:
    """Ours, and the kinds of tokenizer.json that others publish."""
    bpe = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind in ("char", "byte") or kind.startswith("bpe:"):
        return train_tokenizer(kind, CORPUS)
    if kind == "llama3":
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        return foreign(
            models.BPE(),
            bpe,
            pre_tokenizers.Sequence([split, byte_level]),
            normalizers.NFC(),
            decoders.ByteLevel(),
        )
    if kind == "neox":  # runs of spaces are added tokens, matched before anything else
        spaces = [
            AddedToken(text, normalized=True) for text in ("  ", "   ", "    ", "hello world")
        ]
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return foreign(models.BPE(), bpe, whole, normalizers.NFC(), decoders.ByteLevel(), spaces)
    if kind == "roberta":
        return foreign(
            models.BPE(),
            bpe,
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            None,
            decoders.ByteLevel(),
        )
    if kind == "sentencepiece":
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=[EOT, "<unk>"], unk_token="<unk>", show_progress=False
        )
        return foreign(
            models.Unigram(),
            trainer,
            pre_tokenizers.Metaspace(),
            normalizers.NFKC(),
            decoders.Metaspace(),
        )
    if kind == "bert":
        trainer = trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=[EOT, "[UNK]"], show_progress=False
        )
        return foreign(
            models.WordPiece(unk_token="[UNK]"),
            trainer,
            pre_tokenizers.BertPreTokenizer(),
            normalizers.BertNormalizer(),
            decoders.WordPiece(),
        )
    assert kind == "llama2", kind
    return make_llama2()


def make_llama2() -> Tokenizer:
    """No pre-tokenizer, so nowhere to cut; bytes stand for characters that it does not know."""
    names = [EOT, *(f"<0x{b:02X}>" for b in range(256)), "▁", *"helo wrd", "lo"]
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("l", "o")], byte_fallback=True))
    tokenizer.normalizer = prepend
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([EOT])
    return Tokenizer(tokenizer.to_str(), EOT)


KINDS = ["char", "byte", "bpe:400", "llama3", "neox", "roberta", "sentencepiece", "bert"]
MADE: dict[str, Tokenizer] = {}


def tokenizer_of(kind: str) -> Tokenizer:
    return MADE.setdefault(kind, make(kind))


@settings(deadline=None)
@given(TEXTS)
def test_byte_and_bpe_round_trip_every_text(text: str) -> None:
    for kind in ("byte", "bpe:400"):
        tokenizer = tokenizer_of(kind)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


@settings(deadline=None)
@given(st.text(st.sampled_from(sorted(set("".join(CORPUS))))))
def test_char_round_trips_texts_of_its_own_characters(text: str) -> None:
    tokenizer = tokenizer_of("char")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.unk not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_char_counts_unknown_characters_as_one_token_each() -> None:
    tokenizer = tokenizer_of("char")
    ids = tokenizer.encode("HЖЖo")
    assert [i == tokenizer.unk for i in ids] == [False, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_encode_as_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(kind)

    @settings(max_examples=60, deadline=None)
    @given(TEXTS, st.integers(1, 80), st.integers(1, 50))
    def check(text: str, size: int, chunk: int) -> None:
        chunks = [text[at : at + chunk] for at in range(0, len(text), chunk)]
        pieces = list(tokenizer.pieces(chunks, "", size))
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)

    monkeypatch.setattr(tokenizer_module, "CONTEXT", 24)
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_cut(kind: str) -> None:
    rng = random.Random(0)
    words = "".join(CORPUS).split() + ["\n", "  ", "\n\n"]
    text = " ".join(rng.choices(words, k=4000))
    tokenizer = tokenizer_of(kind)
    pieces = list(tokenizer.pieces(iter([text]), "", 2000))
    assert (
        max(map(len, pieces)) <= 2000 + tokenizer_module.CONTEXT
        and len(pieces) >= len(text) // 2300
    )
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_text_without_spaces_is_cut_at_its_punctuation() -> None:
    tokenizer = tokenizer_of("bpe:400")
    text = "世界你好。" * 2000
    pieces = list(tokenizer.pieces([text], "", 1000))
    assert len(pieces) >= 9
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_without_a_cut_a_text_is_encoded_whole_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "hello world " * 1000
    assert list(tokenizer_of("llama2").pieces([text], "", 100)) == [text]
    monkeypatch.setattr(tokenizer_module, "LONGEST_WORD", 3200)
    for tokenizer, uncut in (
        (tokenizer_of("llama2"), text),
        (tokenizer_of("bpe:400"), "a" * 12000),
    ):
        with pytest.raises(
            UserError,
            match=r"^a.txt: the tokenizer cuts nowhere in 3,200 characters; rule: it must",
        ):
            list(tokenizer.pieces([uncut], "a.txt", 100))


@pytest.mark.parametrize("kind", [*KINDS, "llama2"])
def test_what_looks_like_a_special_token_is_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for name in (EOT, UNK):
        ids = tokenizer.encode(f"foo{name}bar")
        assert tokenizer.eot not in ids and len(ids) > 3


def test_what_looks_like_a_special_token_is_cut_as_any_text() -> None:
    tokenizer = train_tokenizer("bpe:300", [EOT * 50])
    ids = tokenizer.encode(EOT)
    parts = [tokenizer.encode(part) for part in ("<|", "endoftext", "|>")]
    assert ids == [i for part in parts for i in part] and len(ids) == 3


def test_ids_are_those_of_the_makers() -> None:
    """Truncation, padding and dropout in a tokenizer.json are for other uses."""
    content = json.loads(tokenizer_of("bpe:400").stored)
    padding = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
    }
    content["padding"] = padding | {"pad_type_id": 0, "pad_token": EOT}
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["model"]["dropout"] = 0.9
    changed = Tokenizer(json.dumps(content), EOT)
    assert changed.encode(CORPUS[0]) == tokenizer_of("bpe:400").encode(CORPUS[0])


def test_vocabulary_sizes() -> None:
    byte = tokenizer_of("byte")
    assert (byte.vocab_size, byte.eot, byte.unk) == (257, 256, None)
    assert byte.encode("aé") == [97, 0xC3, 0xA9]
    bpe = train_tokenizer("bpe:300", CORPUS)
    assert bpe.vocab_size == 300 and bpe.dtype == np.uint16
    text_tokens = [i for i in range(300) if i != bpe.eot]
    assert set(bpe.token_bytes()[text_tokens]) >= {1, 2}
    assert bpe.token_bytes()[bpe.eot] == 0
    char = tokenizer_of("char")
    assert char.vocab_size == len(set("".join(CORPUS))) + 2
    assert char.token_bytes()[[char.eot, char.unk]].tolist() == [0, 0]


def test_training_is_deterministic_and_samples_by_hash() -> None:
    tokenizer = train_tokenizer("bpe:300", CORPUS)
    assert tokenizer.sha256 == train_tokenizer("bpe:300", iter(CORPUS)).sha256
    pieces = [f"document {n} " * 5 for n in range(1000)]
    assert sorted(data for _, data in sample(pieces)) == sorted(piece.encode() for piece in pieces)
    size = sum(len(piece) + 100 for piece in pieces)
    few = sample(pieces, size // 3)
    assert size // 8 < sum(len(data) + 100 for _, data in few) <= size // 3
    # Which ones are taken does not depend on their order.
    assert set(sample(pieces[::-1], size // 3)) == set(few)


def test_training_stops_at_a_size_of_distinct_words() -> None:
    same = ["alpha beta gamma, " * 9] * 50
    other = [f"w{n:03} " * 9 for n in range(50)]
    assert len(list(few_words(sample(same), 30))) == 50
    fed = list(few_words(sample(other), 30))
    assert len(fed) == 8 and set(fed) <= set(other)  # four bytes each


def test_long_words_are_broken_for_the_trainer() -> None:
    fed = list(few_words(sample(["ACGT" * 5000 + " x"])))
    assert "".join(fed).replace("\n", "") == "ACGT" * 5000 + " x"
    assert max(len(word) for part in fed for word in part.split()) <= 1000


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:400"])
def test_transformers_load_it_as_it_is(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of(kind)
    tokenizer.save(tmp_path)
    # The class of this model type would load it wrong.
    (tmp_path / "config.json").write_text('{"model_type": "openai-gpt"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["".join(CORPUS), "  Hello , world .\n\n x ", "it 's"]:
        own = "".join(c for c in text if kind != "char" or c in "".join(CORPUS))
        ids = theirs(own, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(own) and theirs.decode(ids) == own
    assert theirs.eos_token_id == tokenizer.eot and len(theirs) == tokenizer.vocab_size
    ours = Tokenizer.load(tmp_path)
    assert (ours.sha256, ours.eot, ours.unk) == (tokenizer.sha256, tokenizer.eot, tokenizer.unk)


def test_a_run_stands_for_the_tokenizer_of_its_newest_step(tmp_path: Path) -> None:
    for step, kind in (("step-00000003", "byte"), ("step-00000012", "sentencepiece")):
        (tmp_path / "RUN" / step).mkdir(parents=True)
        (tmp_path / "RUN" / step / "config.json").write_text("{}")
        tokenizer_of(kind).save(tmp_path / "RUN" / step)
    newest = load_tokenizer(str(tmp_path / "RUN"))
    assert newest.sha256 == tokenizer_of("sentencepiece").sha256


def test_foreign_folders_keep_their_end_of_text(tmp_path: Path) -> None:
    stored = json.loads(tokenizer_of("sentencepiece").stored)
    stored["added_tokens"][0]["content"] = stored["model"]["vocab"][0][0] = "<end>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(
        UserError,
        match=r"tokenizer\.json: not a usable .*no end-of-text token; nearest: a tokenizer_config"
        r".json that",
    ):
        load_tokenizer(str(tmp_path))
    no_limit = 1000000000000000019884624838656  # transformers writes it for "no limit"
    config = {"eos_token": {"content": "<end>"}, "model_max_length": no_limit}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.eot == 0 and tokenizer.unk == 1
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").sha256 == tokenizer.sha256


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:400", "sentencepiece", "llama3", "llama2"])
def test_stream_decoder_gives_whole_characters_that_add_up(kind: str) -> None:
    tokenizer = tokenizer_of(kind)

    @settings(max_examples=40, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        decoder = StreamDecoder(tokenizer)
        parts = [decoder.push(i) for i in ids] + [decoder.flush()]
        assert "".join(parts) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts)

    check()


@settings(deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40))
def test_stream_decoder_survives_broken_utf8(ids: list[int]) -> None:
    tokenizer = tokenizer_of("byte")
    decoder = StreamDecoder(tokenizer)
    assert "".join([decoder.push(i) for i in ids]) + decoder.flush() == tokenizer.decode(ids)


def test_worker_answers_with_the_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bpe:400")
    tokenizer.save(tmp_path)
    here, there = Pipe()
    for texts in (CORPUS, [""]):
        here.send_bytes(SEPARATOR.join(text.encode() for text in texts))
    worker = Thread(target=serve, args=(str(tmp_path), os.dup(there.fileno())))
    worker.start()
    for expected in (CORPUS, [""]):
        sizes = np.frombuffer(here.recv_bytes(), np.int64)
        tokens = np.frombuffer(here.recv_bytes(), np.uint16)
        encoded = [part.tolist() for part in np.split(tokens, np.cumsum(sizes)[:-1])]
        assert encoded == tokenizer.encode_batch(expected)
    there.close()
    here.close()
    worker.join(10)
    assert not worker.is_alive()


def no_hub(*_: Any, **__: Any) -> str:
    raise ConnectionError("no network")  # an OSError, as the hub's own errors are


BAD_SPECS: list[tuple[Callable[[], Any], int, str]] = [
    (
        lambda: is_trained_spec("bpe:256"),
        2,
        "data.tokenizer='bpe:256': bpe:N must have at least 256 bytes .*: bpe:257",
    ),
    (
        lambda: is_trained_spec("bpe:many"),
        2,
        "data.tokenizer='bpe:many': bpe:N must have .*; nearest: bpe:257",
    ),
    (lambda: load_tokenizer("chars"), 2, r"data.tokenizer='chars': .*; did you mean char\?"),
    (
        lambda: load_tokenizer("gpt-2"),
        2,
        r"data.tokenizer='gpt-2': .*; the hub gave none either \(ConnectionError\)",
    ),
    (
        lambda: load_tokenizer("bpe2048"),
        2,
        r"data.tokenizer='bpe2048': .*; did you mean bpe:2048\?",
    ),
    (
        lambda: load_tokenizer("no/such.json"),
        2,
        "data.tokenizer='no/such.json': not char, byte, bpe:N, .*",
    ),
    (lambda: load_tokenizer(__file__), 65, r".*test_tokenizer.py: not a usable tokenizer \(.*"),
    (
        lambda: tokenizer_of("byte").encode("a\ud800"),
        65,
        "character 1 of the text is a lone surrogate; rule: Unicode",
    ),
]


@pytest.mark.parametrize(("act", "code", "message"), BAD_SPECS)
def test_errors(
    act: Callable[[], Any], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_hub)
    with pytest.raises(UserError, match=f"^{message}$") as raised:
        act()
    assert raised.value.code == code and "\n" not in str(raised.value)


def test_is_trained_spec() -> None:
    assert all(map(is_trained_spec, ("char", "byte", "bpe:257")))
    assert not is_trained_spec("gpt2")
