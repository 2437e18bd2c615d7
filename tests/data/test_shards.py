"""Shards hold what was written, in a format that others read.

Sequences cover every token as a target exactly once.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dist_lm.data.prepared.manifest import FORMAT, MANIFEST, find_prepared
from dist_lm.data.prepared.shard_file import map_shard, write_shard
from dist_lm.data.prepared.shards import TokenShards, verify
from dist_lm.disk import write_file, write_json
from dist_lm.errors import UserError


def make(folder: Path, sizes: list[int], dtype: Any = np.uint16, every: int = 7) -> np.ndarray:
    """A folder whose tokens count up, with a document every few tokens; returns all tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.arange(sum(sizes)).astype(dtype)
    entries = []
    begin = 0
    for n, size in enumerate(sizes):
        # Where the first document starts in this shard; the one before goes on up to there.
        first = -begin % every
        starts = sorted({0, *range(first, size, every)})
        numbers = [(begin + start) // every for start in starts]
        path = folder / f"train-{n:05d}.safetensors"
        sources = [0] * len(starts)
        entry = write_shard(path, tokens[begin : begin + size], starts, sources, numbers)
        entries.append(entry)
        begin += size
    counted = {"documents": 1, "bytes": 1, "unknown": 0}
    splits = {
        "train": counted | {"tokens": sum(sizes), "shards": entries},
        "val": counted | {"tokens": 0, "shards": []},
    }
    (folder / "tokenizer.json").write_text("{}")
    tokenizer = {
        "name": "byte",
        "vocab_size": max(257, sum(sizes)),
        "eot": 256,
        "unk": None,
        "dtype": np.dtype(dtype).name,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    manifest = {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "splits": splits,
        "sources": [{"name": "a.txt", "bytes": 1}],
    }
    write_json(folder / MANIFEST, manifest)
    return tokens


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    seq_len=st.integers(1, 20),
    stride=st.integers(1, 20),
    dtype=st.sampled_from([np.uint16, np.uint32]),
)
def test_sequences_cover_the_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    seq_len: int,
    stride: int,
    dtype: Any,
) -> None:
    stride = min(stride, seq_len)
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        tokens = make(folder, sizes, dtype)
    shards = TokenShards(folder, "train")
    counts = shards.counts(seq_len, stride)
    table = shards.read(np.arange(sum(counts)), seq_len, stride)
    assert table.shape == (sum(counts), seq_len + 1) and table.dtype == dtype
    assert (np.diff(table.astype(np.int64), axis=1) == 1).all()  # a stretch of one shard, in order
    targets = Counter(table[:, 1:].ravel().tolist())
    firsts = np.cumsum([0, *sizes[:-1]])
    wanted = []
    tail = 0
    for first, size, count in zip(firsts.tolist(), sizes, counts, strict=True):
        end = first + (count - 1) * stride + seq_len if count else first
        # Not one more sequence would fit.
        assert first + size - 1 - end < (stride if count else seq_len)
        wanted += range(first + 1, end + 1)
        tail += first + size - 1 - end
    assert sorted(targets) == [int(tokens[i]) for i in wanted]
    assert shards.tail_tokens(seq_len, stride) == tail
    if stride == seq_len:
        assert set(targets.values()) <= {1}
    shuffled = np.random.default_rng(0).permutation(sum(counts))
    assert (shards.read(shuffled, seq_len, stride) == table[shuffled]).all()


def test_documents_of_a_sequence(tmp_path: Path) -> None:
    make(tmp_path, [20, 30], every=7)
    shards = TokenShards(tmp_path, "train")
    assert shards.documents_of(0, 9, 9) == [("a.txt", 0, 0, 7), ("a.txt", 1, 7, 10)]
    assert shards.documents_of(1, 9, 9) == [("a.txt", 1, 0, 5), ("a.txt", 2, 5, 10)]
    # The second shard begins with token 20, the last of document 2.
    assert shards.find(2, 9, 9) == (1, 0)
    assert shards.documents_of(2, 9, 9) == [
        ("a.txt", 2, 0, 1),
        ("a.txt", 3, 1, 8),
        ("a.txt", 4, 8, 10),
    ]


def test_a_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    tokens = make(tmp_path, [50], np.uint32)
    arrays = load_file(tmp_path / "train-00000.safetensors")
    assert (arrays["tokens"] == tokens).all() and arrays["tokens"].dtype == np.uint32
    assert arrays["document_start"].tolist() == list(range(0, 50, 7))
    mapped = map_shard(tmp_path / "train-00000.safetensors")
    assert {name: array.tolist() for name, array in mapped.items()} == {
        n: a.tolist() for n, a in arrays.items()
    }
    assert not list(tmp_path.glob("tmp-*"))


def test_a_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_fsync = os.fsync
    real_replace = os.replace

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(f"fsync {path}")
        real_fsync(descriptor)

    def replace(old: Path, new: Path) -> None:
        done.append(f"rename {old}")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    assert write_file(tmp_path / "a", [b"ab", b"c"]) == hashlib.sha256(b"abc").hexdigest()
    assert (tmp_path / "a").read_bytes() == b"abc"
    assert done == [f"fsync {tmp_path}/tmp-a", f"rename {tmp_path}/tmp-a", f"fsync {tmp_path}"]


def test_a_hundred_shards_need_no_hundred_open_files(tmp_path: Path) -> None:
    make(tmp_path, [2] * 100)
    shards = TokenShards(tmp_path, "train")
    before = len(os.listdir("/proc/self/fd"))
    assert len(shards.read(np.arange(100), 1, 1)) == 100
    assert len(os.listdir("/proc/self/fd")) - before <= 64


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    make(tmp_path, [40, 40])
    assert find_prepared(tmp_path) and not find_prepared(tmp_path / "train-00000.safetensors")
    assert verify(tmp_path) == []
    victim = tmp_path / "train-00001.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-3] ^= 4
    victim.write_bytes(raw)
    TokenShards(tmp_path, "train").check_sizes()  # a flipped bit is only seen by its hash
    assert [line.split(" (sha256")[0] for line in verify(tmp_path)] == ["train-00001.safetensors"]
    victim.write_bytes(raw[:-2])
    with pytest.raises(
        UserError, match=r"train-00001\.safetensors: \d+ where dataset\.json has \d+ bytes; prepare"
    ):
        TokenShards(tmp_path, "train").check_sizes()
    victim.unlink()
    with pytest.raises(
        UserError, match=r"train-00001\.safetensors: missing where dataset\.json has"
    ):
        TokenShards(tmp_path, "train").check_sizes()
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert [line[:24] for line in verify(tmp_path)] == [
        "tokenizer.json (sha256 2",
        "train-00001.safetensors ",
    ]
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(
        UserError,
        match=r"dataset\.json: not valid JSON: .*; nearest: prepare again",
    ):
        verify(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 99}))
    with pytest.raises(
        UserError, match=r"dataset\.json: format 99 is not the format 1 of this version"
    ) as raised:
        TokenShards(tmp_path, "train")
    assert raised.value.code == 65
