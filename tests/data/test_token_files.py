"""Files of raw tokens, such as nanoGPT's train.bin: each token once, in the order of the file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_lm import prepare
from dist_lm.cli import load, resolve
from dist_lm.config import DataConfig
from dist_lm.data.dataset import open_dataset
from dist_lm.data.prepared import token_files, writer
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import UserError
from dist_lm.outcome import TRAIN
from tests.conftest import text_of
from tests.data.test_parts import quiet, rows_of
from tests.data.test_preparing import content, tokens_of
from tests.procs import train
from tests.test_train import assert_same_curve, losses, tiny

BYTE = train_tokenizer("byte", [])


def write_bin(path: Path, count: int, seed: int, dtype: Any = np.uint16) -> list[list[int]]:
    """A file of documents, each with its end of text; returns them."""
    texts = [f"{seed} {text}" for text in text_of(count, seed).split("\n\n")]
    found = [[*BYTE.encode(text), BYTE.eot] for text in texts]
    np.array([token for tokens in found for token in tokens], dtype).tofile(path)
    return found


def settings(path: Path | str, **more: Any) -> DataConfig:
    fields = {"tokenizer": "byte", "dtype": "uint16"} | more
    return DataConfig(input=str(path), **fields)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_every_token_is_copied_once(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_TOKENS", 700)
    monkeypatch.setattr(token_files, "_CHUNK", 97)
    expected = write_bin(tmp_path / "1.bin", 60, 1, dtype) + write_bin(
        tmp_path / "2.bin", 80, 2, dtype
    )
    config = settings(tmp_path / "*.bin", dtype=dtype)
    manifest = prepare_dataset(config, tmp_path / "d", 1, quiet)
    splits = {split: tokens_of(tmp_path / "d", split) for split in ("train", "val")}
    assert 0 < len(splits["val"]) < len(splits["train"])
    found: list[list[int]] = []
    for tokens in splits.values():
        ends = np.flatnonzero(np.array(tokens) == BYTE.eot) + 1
        found += [part.tolist() for part in np.split(np.array(tokens), ends)[:-1]]
    assert Counter(map(tuple, found)) == Counter(map(tuple, expected))
    in_train = set(map(tuple, found[: manifest["splits"]["train"]["documents"]]))
    order = [tokens for tokens in expected if tuple(tokens) in in_train]
    assert [token for tokens in order for token in tokens] == splits["train"]
    spans = TokenShards(tmp_path / "d", "train").documents_of(0, 40, 40)
    assert [(span.source, span.row) for span in spans][:1] == [("1.bin", 1)]
    # The same file in another type is the same data.
    assert manifest["tokenizer"]["dtype"] == "uint16"


def test_few_documents_hold_out_the_end(tmp_path: Path) -> None:
    """Of a file without any end of text too, whose tokens stay as they are."""
    tokens = np.arange(1000) % 250
    tokens.astype(np.uint16).tofile(tmp_path / "a.bin")
    prepare_dataset(settings(tmp_path / "a.bin"), tmp_path / "d", 1, quiet)
    assert tokens_of(tmp_path / "d", "train") == tokens[:900].tolist()
    assert tokens_of(tmp_path / "d", "val") == tokens[900:].tolist()
    found = write_bin(tmp_path / "b.bin", 20, 3)
    prepare_dataset(settings(tmp_path / "b.bin"), tmp_path / "e", 1, quiet)
    both = [*tokens_of(tmp_path / "e", "train"), *tokens_of(tmp_path / "e", "val")]
    assert both == [token for document in found for token in document]


def test_an_interrupted_copy_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_TOKENS", 700)
    write_bin(tmp_path / "a.bin", 120, 1)
    config = settings(tmp_path / "a.bin")
    prepare_dataset(config, tmp_path / "whole", 1, quiet)
    really = writer.SplitWriter.finish

    def interrupted(self: writer.SplitWriter, place: tuple[int, int], skip: int) -> None:
        really(self, place, skip)
        if len(self.shards) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer.SplitWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(config, tmp_path / "cut", 1, quiet)
    monkeypatch.setattr(writer.SplitWriter, "finish", really)
    prepare_dataset(config, tmp_path / "cut", 1, quiet)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_reads_them_as_any_shards(world: int, tmp_path: Path) -> None:
    """With nanoGPT's val.bin as a validation set, which is whole."""
    found = write_bin(tmp_path / "train.bin", 120, 1)
    held = write_bin(tmp_path / "val.bin", 9, 2)
    data = {
        "data.input": str(tmp_path / "train.bin"),
        "data.validation": {"held": {"input": str(tmp_path / "val.bin")}},
        "data.dtype": "uint16",
        "data.tokenizer": "byte",
        "data.val_fraction": 0.0,
        "data.seq_len": 16,
        "data.global_batch": 4,
    }
    run = {"run.dir": str(tmp_path / "run"), "run.eval_batches": 100}
    config = resolve(("test", data | run))
    opened = open_dataset(config, lambda work: work(), quiet)
    tokens = np.array([token for document in found for token in document])
    expected = [tokens[n : n + 17].tobytes() for n in range(0, len(tokens) - 16, 16)]
    assert opened.sequences == len(expected)
    rows = rows_of(config, opened, range(-(-len(expected) // 4)), world)
    assert Counter(rows[: len(expected)]) == Counter(expected)
    assert rows_of(config, opened, range(5, 8), 3 - world) == rows[20:32]
    assert opened.val["held"].sizes == [sum(map(len, held))]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def refusal(content: Any, **more: Any) -> str:
        content.tofile(path)
        with pytest.raises(UserError) as caught:
            prepare_dataset(settings(path, **more), tmp_path / "d", 1, quiet)
        return str(caught.value)

    tokens = np.arange(1, 200)
    assert "every second token is 0 with data.dtype=uint16" in refusal(tokens.astype(np.uint32))
    wrong = refusal(tokens.astype(np.uint16)[:198], dtype="uint32")
    assert "and the tokenizer has 257 tokens; rule: data.tokenizer and data.dtype are" in wrong
    assert "399 bytes are no tokens" in refusal(np.zeros(399, np.uint8))
    assert "0 bytes are no tokens" in refusal(np.zeros(0, np.uint8))
    tokens[100] = 300
    assert "a.bin: token 100 is 300, and the tokenizer has 257" in refusal(tokens.astype(np.uint16))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "holds tokens, and data.dtype=null; rule: their type; nearest: uint16"),
        (["--data.dtype", "uint16"], "data.tokenizer=bpe:2048 would be made from text"),
        (
            ["--data.dtype", "uint16", "--data.tokenizer", "byte", "--data.stream", "true"],
            "holds tokens; nearest: data.stream=false",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(["--data.input", "train.bin", *flags], TRAIN)
    with pytest.raises(UserError, match="data.dtype=uint16 is for files of raw tokens"):
        load(["--data.dtype", "uint16"], TRAIN)


def test_prepare_takes_them(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin", 120, 1)
    words = ["--input", str(tmp_path / "a.bin"), "--dtype", "uint16", "--tokenizer", "byte"]
    prepare.main([*words, "--output", str(tmp_path / "d")])
    settings_of = json.loads((tmp_path / "d/dataset.json").read_text())["settings"]
    assert settings_of["dtype"] == "uint16"


@pytest.mark.slow
def test_a_run_on_them_goes_on_in_another_world(tmp_path: Path) -> None:
    write_bin(tmp_path / "train.bin", 120, 1)
    more = ("--data.tokenizer", "byte", "--data.dtype", "uint16", "--run.steps", "8")
    flags = ["--data.input", str(tmp_path / "train.bin"), *tiny(Path("unused"), *more)[2:]]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "cut", *flags, "--run.stop_after", "4", world=2)
    assert "resuming step-00000004" in train(tmp_path / "cut", *flags)
    assert_same_curve(tmp_path / "cut", tmp_path / "whole", 1e-5)
    assert len(losses(tmp_path / "cut")) == 8
