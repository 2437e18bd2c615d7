"""Make a tokenizer from the corpus: char, byte, or a byte-level BPE.

Invariant: the same pieces of text give the same tokenizer, whatever the machine.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from dist_lm.data.tokenizer import BYTE_OF, EOT, Tokenizer
from dist_lm.errors import UserError

UNK = "<|unk|>"
SAMPLE_BYTES = 256 * 10**6  # of text at most that a BPE is trained on ...
# ... and bytes of distinct words in it: for each of them the trainer takes 120 bytes of memory.
WORD_BYTES = 6 * 10**6

_OVERHEAD = 100  # bytes of memory that keeping a text takes beside the text
_STRETCH = 2**16  # characters of a text that are fed to the trainer at once
_WORD = re.compile(rb"\w+|[^\w\s]+")
_LONG = 1000  # characters of a word, after which it is cut
_LONG_WORD = re.compile(rf"\S{{{_LONG}}}")


def is_trained_spec(spec: str) -> bool:
    """Whether `data.tokenizer` is made from the corpus (char, byte, bpe:N); checks N."""
    if spec in ("char", "byte"):
        return True
    if not spec.startswith("bpe:"):
        return False
    number = spec.removeprefix("bpe:")
    is_number = number.isascii() and number.isdigit()
    if not is_number or int(number) < 257:
        raise UserError(
            f"data.tokenizer={spec!r}: bpe:N must have at least 256 bytes and {EOT};"
            " nearest: bpe:257"
        )
    return True


def train_tokenizer(spec: str, pieces: Iterable[str]) -> Tokenizer:
    """Make `char`, `byte` or `bpe:N` from pieces of text."""
    assert is_trained_spec(spec), f"{spec} is not made from a corpus"
    if spec == "char":
        return _make_char(pieces)
    if spec == "byte":
        pre_tokenizer, decoder = _byte_level()
        return _assemble(models.BPE(BYTE_OF, []), pre_tokenizer, decoder, [EOT])
    return _train_bpe(int(spec.removeprefix("bpe:")), pieces)


def cutter(spec: str) -> Tokenizer:
    """A tokenizer that cuts texts as the one that `spec` will become does."""
    tokenizer = train_tokenizer("char" if spec == "char" else "byte", [])
    tokenizer.atomic = not spec.startswith("bpe:")
    return tokenizer


def sample(pieces: Iterable[str], most: int = SAMPLE_BYTES) -> list[tuple[int, bytes]]:
    """Pieces in the order of a hash of their text, each with that hash.

    All of them if they fit into `most` bytes, else those below a threshold, which is halved
    whenever they do not fit.
    """
    kept: list[tuple[int, bytes]] = []
    threshold = 2**64
    size = 0
    for piece in pieces:
        data = piece.encode()
        digest = hashlib.blake2b(data, digest_size=8, person=b"sample").digest()
        rank = int.from_bytes(digest, "little")
        if rank < threshold:
            kept.append((rank, data))
            size += len(data) + _OVERHEAD
        while size > most:
            threshold //= 2
            kept = [(rank, data) for rank, data in kept if rank < threshold]
            size = sum(len(data) + _OVERHEAD for _, data in kept)
    return sorted(kept)


def few_words(kept: list[tuple[int, bytes]], most: int = WORD_BYTES) -> Iterator[str]:
    """The texts of a sample, until their distinct words have `most` bytes.

    The memory of the trainer follows that size. `kept` is used up.
    """
    seen = bytearray(2**24)  # by a hash; a collision only lets a few more words in
    kept.reverse()
    while kept:
        _, data = kept.pop()
        text = data.decode()
        for begin in range(0, len(text), _STRETCH):
            stretch = text[begin : begin + _STRETCH]
            # Words are made distinct at white space first, so that fewer are matched.
            distinct = set(stretch.encode().split())
            for word in set(_WORD.findall(b" ".join(distinct))):
                place = zlib.crc32(word) % len(seen)
                if not seen[place]:
                    most -= len(word)
                seen[place] = 1
            # The trainer's time grows with the square of a word's length. The expression tries each
            # character as a beginning, so it is spared where nothing is long.
            if max(map(len, distinct), default=0) >= _LONG:
                stretch = _LONG_WORD.sub(r"\g<0>\n", stretch)
            yield stretch
            if most <= 0:
                kept.clear()
                return


def _make_char(pieces: Iterable[str]) -> Tokenizer:
    """A token for each character of the text."""
    characters: set[str] = set()
    for piece in pieces:
        characters.update(piece)
    vocabulary = {token: i for i, token in enumerate([*sorted(characters), UNK])}
    model = models.BPE(vocabulary, [], unk_token=UNK)
    return _assemble(model, None, decoders.Fuse(), [UNK, EOT])


def _train_bpe(size: int, pieces: Iterable[str]) -> Tokenizer:
    """A byte-level BPE with a vocabulary of that size."""
    skeleton = tokenizers.Tokenizer(models.BPE())
    skeleton.pre_tokenizer, skeleton.decoder = _byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOT],
        initial_alphabet=list(BYTE_OF),
        show_progress=False,
    )
    skeleton.train_from_iterator(few_words(sample(pieces)), trainer)
    return Tokenizer(skeleton.to_str(pretty=True), EOT)


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
    """The pre-tokenizer and the decoder of byte-level tokenizers."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizer, decoders.ByteLevel()
