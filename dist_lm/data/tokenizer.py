"""Tokenizers: char, byte, byte-level BPE trained on the corpus, or any tokenizer.json.

Invariants: text that looks like a special token is encoded as plain text; the stored bytes of tokenizer.json are the
tokenizer's identity (`sha256`); the pieces between two cuts encode to the very ids of the whole text.
"""

import codecs
import contextlib
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from dist_lm.errors import DataError, UserError, did_you_mean

EOT = "<|endoftext|>"
UNK = "<|unk|>"
EOT_NAMES = (
    EOT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[SEP]",
)  # of foreign tokenizers that do not say
SAMPLE_BYTES = 256 * 10**6  # text a BPE is trained on at most ...
WORD_BYTES = (
    6 * 10**6
)  # ... and the distinct words in it: the trainer takes 120 bytes of memory for each of theirs
CONTEXT = 256  # characters on each side of a cut that must encode the same with and without it
SEPARATOR = b"\xff"  # is in no UTF-8
LONGEST_WORD = (
    4 * 2**20
)  # characters without a place to cut before a document is refused (bounds memory)

# A cut is looked for before white space, or else before a sign, that follows something else: there a pre-tokenizer's
# runs end whatever came before. Whether this one cuts there too is then tried on the text around it.
_BREAKS = (re.compile(r"(?<=\S)[ \n\t\r\u3000]"), re.compile(r"(?<=\w)[^\w\s]"))
_OVERHEAD = 100  # bytes of memory that keeping a text takes beside the text
_WORD = re.compile(rb"\w+|[^\w\s]+")
_LONG_WORD = re.compile(r"\S{1000}")
# GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, encoder.py, bytes_to_unicode)
_PLAIN = [
    *range(ord("!"), ord("~") + 1),
    *range(ord("¡"), ord("¬") + 1),
    *range(ord("®"), ord("ÿ") + 1),
]
BYTE_OF = {chr(b): b for b in _PLAIN}
BYTE_OF |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PLAIN)}


class Tokenizer:
    """Text to ids and back; frozen. `eot` ends a document, `unk` (None if there is none) stands for unknown text."""

    def __init__(self, stored: str, eot_token: str | None = EOT):
        self._tokenizer = tokenizers.Tokenizer.from_str(stored)
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # ids must be a function of the text
        self.stored = stored
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocabulary.values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        self.eot_token = next(
            (name for name in (eot_token, *EOT_NAMES) if name in self.vocabulary), ""
        )
        if not self.eot_token:
            raise DataError(
                "no end-of-text token; nearest: a tokenizer_config.json that names one as eos_token"
            )
        self.eot = self.vocabulary[self.eot_token]
        content = json.loads(stored)
        model, added, decoder = (
            content["model"],
            content["added_tokens"],
            json.dumps(content["decoder"]),
        )
        unk_id = model.get("unk_id")  # of Unigram; the other models name it
        self.unk_token = model.get("unk_token") if unk_id is None else model["vocab"][unk_id][0]
        self.unk = self.vocabulary.get(self.unk_token or "")
        self.byte_level = isinstance(self._tokenizer.decoder, decoders.ByteLevel)
        self._marks = [
            (mark, text)
            for mark, text in (("▁", " "), ("##", ""))
            if json.dumps(mark)[1:-1] in decoder
        ]
        special = {token["id"]: token["content"] for token in added if token["special"]}
        self.special = set(special)
        # Some models (Unigram, WordLevel) find a special token in text all the same: it is then spelled in two parts.
        self._spelled: dict[int, list[int]] = {}
        found = {i: name for i, name in special.items() if i != self.unk and i in self.encode(name)}
        self._spelled = {
            i: self.encode(name[:1]) + self.encode(name[1:]) for i, name in found.items()
        }
        # One id a character or byte, so that any place is a cut.
        plain = content["normalizer"] is None and len(special) == len(added)
        self.atomic = plain and model["type"] == "BPE" and not model["merges"]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a tokenizer.json, or a folder that holds one (and perhaps a tokenizer_config.json)."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        config = file.with_name("tokenizer_config.json")
        try:
            named = (
                json.loads(config.read_text(encoding="utf-8")).get("eos_token")
                if config.is_file()
                else None
            )
            return cls(
                file.read_text(encoding="utf-8"),
                named["content"] if isinstance(named, dict) else named,
            )
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"{file}: not a usable tokenizer ({' '.join(str(error).split())})"
            ) from error

    @cached_property
    def text_tokens(self) -> dict[int, str]:
        """The tokens that stand for text, by id."""
        return {i: token for token, i in self.vocabulary.items() if i not in self.special}

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.stored.encode()).hexdigest()

    def files(self) -> dict[str, str]:
        """tokenizer.json, and the tokenizer_config.json that makes AutoTokenizer load it as it is, by name."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        config |= {"eos_token": self.eot_token} | (
            {"unk_token": self.unk_token} if self.unk is not None else {}
        )
        return {
            "tokenizer.json": self.stored,
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }

    def save(self, folder: str | Path) -> None:
        for name, text in self.files().items():
            Path(folder, name).write_text(text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"character {error.start} of the text is a lone surrogate; rule: Unicode"
            ) from error
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # Even of one text faster than encode(), which also follows each token's place in the text.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._spell(encoding.ids) for encoding in encodings]

    def _spell(self, ids: list[int]) -> list[int]:
        return [j for i in ids for j in self._spelled.get(i, (i,))] if self._spelled else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 text that each id stands for, 0 for special tokens."""
        sizes = np.zeros(self.vocab_size, np.int64)
        for i, token in self.text_tokens.items():
            sizes[i] = len(self.bytes_of(token))
        return sizes

    def bytes_of(self, token: str) -> bytes:
        if self.byte_level and all(c in BYTE_OF for c in token):
            return bytes(BYTE_OF[c] for c in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):  # sentencepiece's byte fallback
            return bytes([int(token[3:5], 16)])
        for mark, text in self._marks:
            token = token.replace(mark, text)
        return token.encode()

    def cut(self, text: str, limit: int) -> int:
        """The last place in text[1:limit + 1] where cutting leaves the ids as they are; 0 where there is none."""
        if self.atomic:
            return limit
        if self._tokenizer.pre_tokenizer is None:
            return 0
        for breaks in _BREAKS:
            for start in (max(0, limit - 2**14), 0):
                places = [match.start() for match in breaks.finditer(text, start, limit)]
                found = next(
                    (place for place in reversed(places[-256:]) if self._cuts_at(text, place)), 0
                )
                if found:
                    return found
        return 0

    def _cuts_at(self, text: str, place: int) -> bool:
        left, right = text[max(0, place - CONTEXT) : place], text[place : place + CONTEXT]
        return all(
            parts(left) + parts(right) == parts(left + right)
            for parts in (self._words, self.encode)
        )

    def _words(self, text: str) -> list[str]:
        text = (
            self._tokenizer.normalizer.normalize_str(text) if self._tokenizer.normalizer else text
        )
        return [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def pieces(self, chunks: Iterable[str], where: str, size: int = 2**20) -> Iterator[str]:
        """One document's text in pieces of at most about `size` characters that encode as the whole does."""
        waiting, limit = "", size
        for chunk in chunks:
            waiting += chunk
            while len(waiting) >= limit + CONTEXT:
                place = self.cut(waiting, limit)
                if place:
                    yield waiting[:place]
                    waiting, limit = waiting[place:], size
                elif limit >= LONGEST_WORD:
                    said = f"{where}: the tokenizer cuts nowhere in {limit:,} characters; rule: it must within that"
                    raise DataError(said)
                else:
                    limit *= 2
        if waiting:
            yield waiting


class StreamDecoder:
    """Ids to text as they come: `push` gives only whole characters, `flush` what is left at the end."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = 0  # characters of their text

    def push(self, token_id: int) -> str:
        if self._tokenizer.byte_level or self._tokenizer.atomic:
            return self._utf8.decode(
                self._tokenizer.bytes_of(self._tokenizer.text_tokens.get(token_id, ""))
            )
        self._ids.append(
            token_id
        )  # a decoder may treat the first token apart, so all are decoded again
        return self._new(
            self._tokenizer.decode(self._ids).rstrip("\ufffd")
        )  # perhaps the first bytes of a character

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True) + self._new(self._tokenizer.decode(self._ids))

    def _new(self, text: str) -> str:
        shown, self._shown = self._shown, max(self._shown, len(text))
        return text[shown:]


def is_trained_spec(spec: str) -> bool:
    """Whether `data.tokenizer` is made from the corpus (char, byte, bpe:N) rather than loaded; checks N."""
    if spec in ("char", "byte"):
        return True
    if not spec.startswith("bpe:"):
        return False
    size = int(spec[4:]) if spec[4:].isascii() and spec[4:].isdigit() else 0
    if size < 257:
        raise UserError(
            f"data.tokenizer={spec!r}: bpe:N must have at least 256 bytes and {EOT}; nearest: bpe:257"
        )
    return True


def train_tokenizer(spec: str, pieces: Iterable[str]) -> Tokenizer:
    """Make `char`, `byte` or `bpe:N`; the same from the same pieces, whatever the machine."""
    assert is_trained_spec(spec), f"{spec} is not made from a corpus"
    if spec == "char":
        characters: set[str] = set()
        for piece in pieces:
            characters.update(piece)
        alphabet = sorted(characters)
        model = models.BPE({c: i for i, c in enumerate([*alphabet, UNK])}, [], unk_token=UNK)
        return _assemble(model, None, decoders.Fuse(), [UNK, EOT])
    if spec == "byte":
        return _assemble(models.BPE(BYTE_OF, []), *_byte_level(), [EOT])
    skeleton = tokenizers.Tokenizer(models.BPE())
    skeleton.pre_tokenizer, skeleton.decoder = _byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=int(spec[4:]),
        special_tokens=[EOT],
        initial_alphabet=list(BYTE_OF),
        show_progress=False,
    )
    skeleton.train_from_iterator(few_words(sample(pieces)), trainer)
    return Tokenizer(skeleton.to_str(pretty=True), EOT)


def cutter(spec: str) -> Tokenizer:
    """A tokenizer that cuts as the one that `spec` will become does."""
    tokenizer = train_tokenizer("char" if spec == "char" else "byte", [])
    tokenizer.atomic = not spec.startswith("bpe:")
    return tokenizer


def sample(pieces: Iterable[str], most: int = SAMPLE_BYTES) -> list[tuple[int, bytes]]:
    """Pieces in the order of a hash of their text: all of them if they fit, else those below a falling threshold."""
    kept: list[tuple[int, bytes]] = []
    threshold, size = 2**64, 0
    for piece in pieces:
        data = piece.encode()
        rank = int.from_bytes(
            hashlib.blake2b(data, digest_size=8, person=b"sample").digest(), "little"
        )
        if rank < threshold:
            kept.append((rank, data))
            size += len(data) + _OVERHEAD
        while size > most:
            threshold //= 2
            kept = [(rank, data) for rank, data in kept if rank < threshold]
            size = sum(len(data) + _OVERHEAD for _, data in kept)
    return sorted(kept)


def few_words(kept: list[tuple[int, bytes]], most: int = WORD_BYTES) -> Iterator[str]:
    """The sample's texts, up to a size of their distinct words, which is what the trainer's memory follows."""
    seen = bytearray(2**24)  # by a hash; one taken for another only lets a little more in
    kept.reverse()
    while kept:
        text = kept.pop()[1].decode()
        for part in (text[at : at + 2**16] for at in range(0, len(text), 2**16)):
            for word in set(_WORD.findall(b" ".join(set(part.encode().split())))):
                place = zlib.crc32(word) % len(seen)
                most -= 0 if seen[place] else len(word)
                seen[place] = 1
            yield _LONG_WORD.sub(
                r"\g<0>\n", part
            )  # the trainer takes forever over long words (squared)
            if most <= 0:
                return kept.clear()


def load_tokenizer(spec: str) -> Tokenizer:
    """A local tokenizer.json, a folder with one, or a hub name."""
    if Path(spec).exists():
        return Tokenizer.load(spec)
    hint = did_you_mean(spec, ("char", "byte", "bpe:2048"))
    if re.fullmatch(r"[\w.-]+/[\w.-]+" if hint else r"[\w.-]+(/[\w.-]+)?", spec):
        import huggingface_hub  # slow, and needed for hub names only

        try:
            file = huggingface_hub.hf_hub_download(spec, "tokenizer.json")
            with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
                huggingface_hub.hf_hub_download(spec, "tokenizer_config.json")  # lands beside it
        except (OSError, ValueError) as error:
            hint = f"; the hub gave none either ({type(error).__name__}){hint}"
        else:
            return Tokenizer.load(file)
    raise UserError(
        f"data.tokenizer={spec!r}: not char, byte, bpe:N, a tokenizer.json or a folder with one{hint}"
    )


def _assemble(
    model: models.Model, pre_tokenizer: Any, decoder: Any, special: list[str]
) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return Tokenizer(tokenizer.to_str(pretty=True), EOT)


def _byte_level() -> tuple[Any, Any]:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), decoders.ByteLevel()
