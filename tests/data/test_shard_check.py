"""Damaged token shards are found before they are trained on, once, and by all ranks alike."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dist_lm.config import RunConfig
from dist_lm.data.order import sequence_ids
from dist_lm.data.prepared import shard_check
from dist_lm.data.prepared.manifest import MANIFEST
from dist_lm.data.prepared.shard_check import RECORD, ShardCheck
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.errors import UserError
from tests.conftest import TINY
from tests.data.test_shards import make
from tests.procs import finish, start_ranks, train

SHARD = "train-00000.safetensors"


def damage(shard: Path, at: int = -20) -> None:
    """Change one byte; the size stays."""
    raw = bytearray(shard.read_bytes())
    raw[at] ^= 1
    shard.write_bytes(raw)


def sign(folder: Path, name: str) -> None:
    """Put the hash of a shard into the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for split in manifest["splits"].values():
        for entry in split["shards"]:
            if entry["file"] == name:
                entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


class Hashed:
    """The files that a check reads, and what it refuses."""

    def __init__(self, run_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.run_dir = run_dir
        self.folder = folder
        self.opened: list[str] = []
        self.refused: list[str] = []
        real = hashlib.sha256

        def count() -> Any:
            self.opened.append("hashed")
            return real()

        monkeypatch.setattr(shard_check, "hashlib", SimpleNamespace(sha256=count))

    def check(self) -> int:
        """How many shards were hashed."""
        self.opened.clear()
        sets = [TokenShards(self.folder, "train")]
        with ShardCheck(self.run_dir, sets, lambda error: self.refused.append(str(error))) as check:
            check.wait()
        return len(self.opened)


def test_each_shard_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "p"
    make(folder, [40, 40, 40])
    hashed = Hashed(tmp_path, folder, monkeypatch)
    assert hashed.check() == 3
    assert hashed.check() == 0
    os.utime(folder / SHARD, (1, 1))
    assert hashed.check() == 1
    sign(folder, SHARD)
    (tmp_path / RECORD).write_text("[")
    assert hashed.check() == 3 and hashed.refused == []
    record = json.loads((tmp_path / RECORD).read_text())
    assert len(record) == 3 and record[str(folder / SHARD)][0] == (folder / SHARD).stat().st_size


def test_damage_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "p"
    make(folder, [40, 40, 40])
    hashed = Hashed(tmp_path, folder, monkeypatch)
    hashed.check()
    damage(folder / SHARD)
    assert hashed.check() == 1
    (message,) = hashed.refused
    assert message == (
        f"{folder}/{SHARD}: not a shard as it was prepared: it does not match its hash in the"
        " manifest; nearest: prepare again"
    )
    assert hashed.check() == 1  # a damaged one is not recorded
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()
    shards = TokenShards.__new__(TokenShards)
    shards.cache, shards.folder = None, folder
    shards.entries = [{"file": SHARD, "sha256": "0" * 64}]
    with ShardCheck(tmp_path, [shards], lambda error: hashed.refused.append(str(error))) as check:
        check.wait()
    assert "it cannot be read" in hashed.refused[-1]


def test_the_check_gives_up_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a run, and whatever it finds then is not recorded as checked."""
    make(tmp_path / "p", [40])
    monkeypatch.setattr(shard_check, "_CHUNK", 1)
    monkeypatch.setattr(shard_check, "HEAD_START", 0.0)
    check = ShardCheck(tmp_path, [TokenShards(tmp_path / "p", "train")], lambda error: None)
    check._is_stopping.set()
    with check:
        pass
    assert not (tmp_path / RECORD).exists()


def test_a_token_above_the_vocabulary_is_named(tmp_path: Path) -> None:
    make(tmp_path, [40, 40])
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    shards = TokenShards(tmp_path, "train")
    sequences = np.arange(sum(shards.counts(9, 9)))
    largest = int(shards.read(sequences, 9, 9).max())
    for vocab_size, is_good in ((largest + 1, True), (largest, False)):
        manifest["tokenizer"]["vocab_size"] = vocab_size
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        shards = TokenShards(tmp_path, "train")
        if is_good:
            shards.read(sequences, 9, 9)
            continue
        with pytest.raises(
            UserError, match=rf"train-0000\d.*: token {largest} is none of"
        ) as raised:
            shards.read(sequences, 9, 9)
        assert raised.value.code == 65


# --- on real processes


def flags(folder: Path, *more: str) -> list[str]:
    values = dict(zip(TINY[::2], TINY[1::2], strict=True))
    values |= dict(zip(more[::2], more[1::2], strict=True))
    words = ["--data.input", str(folder), "--run.trackers"]
    for flag, value in values.items():
        words += [flag, value]
    return words


@pytest.mark.slow
def test_damage_between_stop_and_resume(prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "p")
    train(tmp_path / "run", *flags(folder, "--run.steps", "4"))
    damage(folder / SHARD)
    output = train(tmp_path / "run", *flags(folder, "--run.steps", "8"), world=2, code=65)
    assert output.count("it does not match its hash in the manifest") == 1
    assert f"error: {folder}/{SHARD}: not a shard as it was prepared" in output
    assert json.loads((tmp_path / "run/outcome.json").read_text())["class"] == "data"
    damage(folder / SHARD)
    train(tmp_path / "run", *flags(folder, "--run.steps", "8"), world=2)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "position"), [("ddp", 1), ("zero3", 25)])
def test_one_rank_reads_an_unknown_token(
    strategy: str, position: int, prepared: Path, tmp_path: Path
) -> None:
    """All ranks end alike, and nothing of that step is saved."""
    folder = shutil.copytree(prepared, tmp_path / "p")
    shards = TokenShards(folder, "train")
    total = sum(shards.counts(32, 32))
    (sequence,) = sequence_ids(np.array([position]), total, RunConfig().seed)
    shard, first = shards.find(int(sequence), 32, 32)
    file = folder / shards.files[shard]
    raw = bytearray(file.read_bytes())
    at = len(raw) - 2 * (shards.sizes[shard] - first - 5)
    raw[at : at + 2] = (999).to_bytes(2, "little")
    file.write_bytes(raw)
    sign(folder, file.name)
    words = flags(folder, "--run.save_every", "1", "--launch", strategy)
    command = ("dist_lm/train.py", "--run.dir", str(tmp_path / "run"), *words)
    ranks = start_ranks(2, *command)
    _, output = finish(ranks)
    assert [rank.returncode for rank in ranks] == [65, 65], output
    assert (
        f"error: rank 1: {file}: not a shard as it was prepared: token 999 is none of 257" in output
    )
    saved = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert saved == ([] if position == 1 else ["step-00000001", "step-00000002"])


@pytest.mark.slow
def test_validation_in_another_alphabet(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("plain letters, again and again\n" * 200)
    (tmp_path / "zh.txt").write_text("一二三四五六七八九十\n".replace("\n", "。") * 300)
    sets = f"{{zh: {{input: {tmp_path}/zh.txt}}}}"
    words = ("--data.tokenizer", "char", "--run.eval_every", "5", "--data.validation", sets)
    output = train(tmp_path / "run", *flags(tmp_path / "en.txt", *words), code=65)
    assert "validation set zh" in output and "the tokenizer knows nothing of its text" in output
    assert "Traceback" not in output
