"""Text to ids and back, with our own tokenizers or any tokenizer.json.

Invariants: text that looks like a special token is encoded as plain text. The stored bytes of
tokenizer.json are the tokenizer's identity (`sha256`). The pieces between two cuts encode to the
very ids of the whole text.
"""

import codecs
import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders

from dist_lm.console import printable
from dist_lm.data.fast_bpe import SAMPLE, CannotExpress, make_engine
from dist_lm.data.remote import fetch_small, is_remote
from dist_lm.data.tokenizer_check import refuse_excess
from dist_lm.errors import DataError, UserError
from dist_lm.nearest import did_you_mean
from dist_lm.outside import parse_json, read_bytes, read_json
from dist_lm.pretrained import find_tokenizer

EOT = "<|endoftext|>"
# End-of-text tokens of foreign tokenizers that do not name theirs.
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")

CONTEXT = 256  # characters on each side of a cut that must encode the same with and without it
# Characters without a place to cut, before a document is refused; this bounds memory.
LONGEST_WORD = 4 * 2**20

# Places that are tried as cuts: before white space, or else before a sign, that follows something
# else. There the runs of a pre-tokenizer end, whatever came before. Whether this tokenizer cuts
# there too is then tried on the text around the place.
_BREAKS = (re.compile(r"(?<=\S)[ \n\t\r\u3000]"), re.compile(r"(?<=\w)[^\w\s]"))
_NEARBY = 2**14  # characters before the limit that are searched before all the others
_LONGEST_REASON = 300  # characters of what the library says
_NO_LIMIT = int(1e30)  # what transformers writes as model_max_length where there is no limit
_MOST_TRIED = 256  # of the places found in one search

# In decoders of sentencepiece and WordPiece: marks in tokens, and the text that they stand for.
_MARKS = {"▁": " ", "##": ""}
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's byte fallback


def _printable_bytes() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes.

    Source: Radford et al. 2019, encoder.py, bytes_to_unicode.
    """
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain}
    for n, byte in enumerate(others):
        byte_of[chr(256 + n)] = byte
    return byte_of


BYTE_OF = _printable_bytes()


class Tokenizer:
    """Text to ids and back; frozen.

    - `stored`: the text of tokenizer.json
    - `vocabulary`: id of each token; `vocab_size` is the greatest of them plus 1
    - `dtype`: in which ids are stored
    - `eot`, `eot_token`: end of text, which ends a document
    - `unk`, `unk_token`: stands for unknown text; None if there is none
    - `special`: the ids that stand for no text
    - `atomic`: each character or byte is one id, so that any place is a cut
    """

    def __init__(self, stored: str, eot_token: str | None = EOT):
        self._tokenizer = _open(stored)
        self._why_slow = ""
        self.stored = stored
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocabulary.values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        self.eot_token = self._find_eot(eot_token)
        self.eot = self.vocabulary[self.eot_token]

        content = json.loads(stored)
        model = content["model"]
        added = content["added_tokens"]
        unk_id = model.get("unk_id")  # of Unigram; the other models name the token
        self.unk_token = model.get("unk_token") if unk_id is None else model["vocab"][unk_id][0]
        self.unk = self.vocabulary.get(self.unk_token or "")
        self.byte_level = isinstance(self._tokenizer.decoder, decoders.ByteLevel)
        decoder = json.dumps(content["decoder"])
        self._marks: dict[str, str] = {}
        for mark, text in _MARKS.items():
            if json.dumps(mark)[1:-1] in decoder:
                self._marks[mark] = text
        special = {token["id"]: token["content"] for token in added if token["special"]}
        self.special = set(special)
        self._spelled: dict[int, list[int]] = {}
        self._spelled = self._spell_special(special)
        is_plain = content["normalizer"] is None and len(special) == len(added)
        self.atomic = is_plain and model["type"] == "BPE" and not model["merges"]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a tokenizer.json, or a folder with one (and perhaps a tokenizer_config.json).

        The folder may also be a run, whose steps have one.
        """
        file = find_tokenizer(path)

        def refuse(why: str) -> UserError:
            return DataError(f"{file}: not a usable tokenizer ({why})")

        data = read_bytes(file, refuse)
        content = parse_json(data, refuse)
        try:
            refuse_excess(content)
            eot_token = _eos_token(file.with_name("tokenizer_config.json"))
            return cls(data.decode(), eot_token)
        except BaseException as error:  # tokenizers raises bare Exception, or panics
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            reason = " ".join(str(error).split())
            raise refuse(printable(reason[:_LONGEST_REASON])) from error

    @cached_property
    def text_tokens(self) -> dict[int, str]:
        """The tokens that stand for text, by id."""
        return {i: token for token, i in self.vocabulary.items() if i not in self.special}

    @cached_property
    def sha256(self) -> str:
        """The hash of tokenizer.json, by which tokenizers are compared."""
        return hashlib.sha256(self.stored.encode()).hexdigest()

    def files(self) -> dict[str, str]:
        """The texts of tokenizer.json and tokenizer_config.json, by file name.

        The second makes AutoTokenizer load the first as it is.
        """
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": self.eot_token,
        }
        if self.unk is not None:
            config["unk_token"] = self.unk_token
        return {
            "tokenizer.json": self.stored,
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }

    def save(self, folder: str | Path) -> None:
        for name, text in self.files().items():
            Path(folder, name).write_text(text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        _refuse_surrogates(text)
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # For one text too this is faster than encode(), which also tracks each token's place.
        with _panic_is_refused("encoding"):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._replace_special(encoding.ids) for encoding in encodings]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of encode_batch, as arrays of `dtype`. It may be faster for much text."""
        engine = self._engine
        arrays = []
        if engine is None:
            for text in texts:
                _refuse_surrogates(text)
            for ids in self.encode_batch(texts):
                arrays.append(np.array(ids, self.dtype))
        else:
            for text in texts:
                _refuse_surrogates(text)
                ids = engine.encode_to_numpy(text, disallowed_special=())
                arrays.append(ids.astype(self.dtype))
        return arrays

    @cached_property
    def _engine(self) -> Any:
        """A tiktoken.Encoding with the same ids, or None. It takes parts of a second to make."""
        try:
            if self._spelled:
                raise CannotExpress("its special tokens are found in text")
            engine = make_engine(json.loads(self.stored), BYTE_OF)
            if engine.encode_ordinary(SAMPLE) != self.encode(SAMPLE):
                raise CannotExpress("a sample of text has other ids")
        except CannotExpress as error:
            self._why_slow = str(error)
            return None
        return engine

    def encodes_beside_python(self) -> bool:
        """Whether other threads can work while encode_arrays encodes."""
        return self._engine is not None

    def why_slow(self) -> str:
        """The reason why tiktoken cannot encode for this tokenizer, or an empty string."""
        if self._engine is not None:
            return ""
        return self._why_slow

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        with _panic_is_refused("decoding"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 text that each id stands for, 0 for special tokens."""
        sizes = np.zeros(self.vocab_size, np.int64)
        for i, token in self.text_tokens.items():
            sizes[i] = len(self.bytes_of(token))
        return sizes

    def bytes_of(self, token: str) -> bytes:
        """The bytes of UTF-8 text that a token stands for."""
        if self.byte_level and all(c in BYTE_OF for c in token):
            return bytes(BYTE_OF[c] for c in token)
        if _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        for mark, text in self._marks.items():
            token = token.replace(mark, text)
        return token.encode()

    def pieces(self, chunks: Iterable[str], where: str, size: int = 2**20) -> Iterator[str]:
        """One document's text in pieces that encode as the whole does.

        A piece has at most about `size` characters. `where` is the document's place, for messages.
        """
        waiting = ""
        limit = size
        for chunk in chunks:
            waiting += chunk
            while len(waiting) >= limit + CONTEXT:
                place = self.cut(waiting, limit)
                if place:
                    yield waiting[:place]
                    waiting = waiting[place:]
                    limit = size
                elif limit < LONGEST_WORD:
                    limit *= 2
                else:
                    raise DataError(
                        f"{where}: the tokenizer cuts nowhere in {limit:,} characters; rule: it"
                        " must within that"
                    )
        if waiting:
            yield waiting

    def cut(self, text: str, limit: int) -> int:
        """The last place in text[1:limit + 1] where cutting leaves the ids as they are.

        Returns 0 if there is none.
        """
        if self.atomic:
            return limit
        if self._tokenizer.pre_tokenizer is None:
            return 0
        for breaks in _BREAKS:
            for start in (max(0, limit - _NEARBY), 0):
                places = [match.start() for match in breaks.finditer(text, start, limit)]
                for place in reversed(places[-_MOST_TRIED:]):
                    if place and self._cuts_at(text, place):
                        return place
        return 0

    def _cuts_at(self, text: str, place: int) -> bool:
        """Whether the text around a place is split and encoded the same with a cut there."""
        left = text[max(0, place - CONTEXT) : place]
        right = text[place : place + CONTEXT]
        if self._words(left) + self._words(right) != self._words(left + right):
            return False
        return self.encode(left) + self.encode(right) == self.encode(left + right)

    def _words(self, text: str) -> list[str]:
        """The parts that the tokenizer encodes one by one."""
        with _panic_is_refused("cutting"):
            if self._tokenizer.normalizer:
                text = self._tokenizer.normalizer.normalize_str(text)
            return [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def _find_eot(self, eot_token: str | None) -> str:
        for name in (eot_token, *EOT_NAMES):
            if name in self.vocabulary:
                return name
        raise DataError(
            "no end-of-text token; nearest: a tokenizer_config.json that names one as eos_token"
        )

    def _spell_special(self, special: dict[int, str]) -> dict[int, list[int]]:
        """The ids that text gets instead of a special token.

        Some models (Unigram, WordLevel) find a special token in text although they are told not
        to. The token's text is then encoded in two parts.
        """
        spelled = {}
        for i, name in special.items():
            if i != self.unk and i in self.encode(name):
                spelled[i] = self.encode(name[:1]) + self.encode(name[1:])
        return spelled

    def _replace_special(self, ids: list[int]) -> list[int]:
        if not self._spelled:
            return ids
        replaced: list[int] = []
        for i in ids:
            replaced += self._spelled.get(i, (i,))
        return replaced


class StreamDecoder:
    """Ids to text as they come: `push` returns only whole characters, `flush` what is left."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # all so far, where a token's text depends on others
        self._shown = 0  # characters of their text that were returned

    def push(self, token_id: int) -> str:
        if self._tokenizer.byte_level or self._tokenizer.atomic:
            token = self._tokenizer.text_tokens.get(token_id, "")
            return self._utf8.decode(self._tokenizer.bytes_of(token))
        # A decoder may treat the first token apart, so all of them are decoded again.
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        # At the end there may be the first bytes of a character.
        return self._new(text.rstrip("\ufffd"))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True) + self._new(self._tokenizer.decode(self._ids))

    def _new(self, text: str) -> str:
        """The part of the text that was not returned before."""
        shown = self._shown
        self._shown = max(shown, len(text))
        return text[shown:]


def load_tokenizer(spec: str) -> Tokenizer:
    """From a local tokenizer.json, a folder with one, or the hub."""
    if Path(spec).exists():
        return Tokenizer.load(spec)
    hint = did_you_mean(spec, ("char", "byte", "bpe:2048"))
    # A name near char or byte is rather a slip than one of the few hub names without an owner.
    hub_name = r"[\w.-]+/[\w.-]+" if hint else r"[\w.-]+(/[\w.-]+)?"
    if re.fullmatch(hub_name + r"(@[\w.-]+)?", spec):
        try:
            file = _download(spec)
        except (OSError, ValueError) as error:
            hint = f"; the hub gave none either ({type(error).__name__}){hint}"
        else:
            return Tokenizer.load(file)
    raise UserError(
        f"data.tokenizer={spec!r}: not char, byte, bpe:N, a tokenizer.json or a folder with one"
        f"{hint}"
    )


def tokenizer_of(folder: str) -> Tokenizer:
    """The tokenizer in a prepared folder, at its URL, or in a run's data folder."""
    if not is_remote(folder):
        return Tokenizer.load(folder)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            Path(scratch, name).write_bytes(fetch_small(f"{folder}/{name}"))
        return Tokenizer.load(scratch)


def _download(name: str) -> str:
    """The path of a hub tokenizer's tokenizer.json, with its tokenizer_config.json beside it."""
    import huggingface_hub  # slow, and needed for hub names only

    repo, _, revision = name.partition("@")
    fetch = partial(huggingface_hub.hf_hub_download, repo, revision=revision or None)
    file = fetch("tokenizer.json")
    with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
        fetch("tokenizer_config.json")
    return file


def _open(stored: str) -> tokenizers.Tokenizer:
    """A tokenizer that does only what ids need: they must be a function of the text."""
    tokenizer = tokenizers.Tokenizer.from_str(stored)
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is a lone surrogate; rule: Unicode"
        ) from error


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up. Its exception has no class to import, and is no Exception."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _panic_is_refused(action: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        reason = printable(" ".join(str(error).split())[:_LONGEST_REASON])
        raise DataError(f"the tokenizer gave up {action} a text ({reason})") from error


def _eos_token(config_file: Path) -> str | None:
    """The end-of-text token that a tokenizer_config.json names, if there is one."""
    if not config_file.is_file():
        return None

    def refuse(why: str) -> UserError:
        return DataError(f"{config_file.name}: {why}")

    config = read_json(config_file, refuse, largest_number=_NO_LIMIT)
    token = config.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    name: str | None = token
    return name
