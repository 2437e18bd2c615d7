"""Preparing gives the same bytes, however often it is stopped, on any number of processes.

Documents are held out by their text.
"""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm import prepare
from dist_lm.config import DataConfig, SourceConfig
from dist_lm.data import tokenizer as text
from dist_lm.data.prepared import encode, preparing, writer
from dist_lm.data.prepared.holdout import document_hash, held_out
from dist_lm.data.prepared.manifest import MANIFEST
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.prepared.progress import Progress
from dist_lm.data.prepared.shard_file import map_shard
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.text.files import TextFile
from dist_lm.data.text.formats import Reader
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import RetryableError, UserError

WORDS = "tree bird,\n house runs. sleeps 12345 über 世界 <|endoftext|> don't\t under".split(" ")


def is_held_out(text: str, fraction: float) -> bool:
    return held_out(document_hash(iter([text]))[0], fraction)


def write_documents(path: Path, number: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(number)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return documents


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quiet(_: str) -> None:
    pass


def tokens_of(folder: Path, split: str) -> list[int]:
    entries = json.loads((folder / MANIFEST).read_text())["splits"][split]["shards"]
    return [i for entry in entries for i in map_shard(folder / entry["file"])["tokens"].tolist()]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_shards tests what survives a power failure; here fsync would only cost time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_TOKENS", 300)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
def test_shards_hold_the_documents(tokenizer: str, tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "a.jsonl", 150)
    manifest = prepare_dataset(
        DataConfig(input=str(tmp_path / "a.jsonl"), tokenizer=tokenizer), tmp_path / "d", 1, quiet
    )
    loaded = Tokenizer.load(tmp_path / "d")
    for split in ("train", "val"):
        chosen = [text for text in documents if is_held_out(text, 0.1) == (split == "val")]
        expected = [i for text in chosen for i in [*loaded.encode(text), loaded.eot]]
        assert tokens_of(tmp_path / "d", split) == expected
        entry = manifest["splits"][split]
        assert (
            entry["documents"] == len(chosen)
            and entry["tokens"] == len(expected)
            and entry["unknown"] == 0
        )
        assert entry["bytes"] == sum(len(text.encode()) for text in chosen)
        assert loaded.token_bytes()[expected].sum() == entry["bytes"]
        assert all(shard["tokens"] == 300 for shard in entry["shards"][:-1])
        shards = TokenShards(tmp_path / "d", split)
        for sequence, row in enumerate(shards.read(np.arange(sum(shards.counts(40, 40))), 40, 40)):
            for span in shards.documents_of(sequence, 40, 40):
                written = loaded.decode(
                    [i for i in row[span.start : span.stop].tolist() if i != loaded.eot]
                )
                assert (
                    span.source == "a.jsonl" and written.strip("\ufffd") in documents[span.row - 1]
                )
    assert (
        manifest["tokenizer"]["sha256"] == loaded.sha256
        and manifest["tokenizer"]["eot"] == loaded.eot
    )
    assert not (tmp_path / "d" / writer.PROGRESS).exists()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("tokenizer, is_in_threads", [("bpe:300", True), ("char", False)])
def test_any_number_of_threads_or_processes_gives_the_same_bytes(
    tokenizer: str, is_in_threads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "a.jsonl", 200)
    monkeypatch.setattr(encode, "JOB_CHARACTERS", 100)  # many more jobs than processes
    unused = "WorkerPool" if is_in_threads else "EncodingThreads"
    monkeypatch.delattr(encode, unused)
    config = DataConfig(input=str(tmp_path / "a.jsonl"), tokenizer=tokenizer)
    for processes in (1, 3):
        prepare_dataset(config, tmp_path / str(processes), processes, quiet)
    assert content(tmp_path / "1") == content(tmp_path / "3")


def test_unknown_characters_are_counted_and_said(tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text("abc \n" * 50)
    prepare_dataset(
        DataConfig(input=str(tmp_path / "known.txt"), tokenizer="char"), tmp_path / "a", 1, quiet
    )
    (tmp_path / "other.txt").write_text("abcd\n" * 100)
    said: list[str] = []
    config = DataConfig(
        input=str(tmp_path / "other.txt"), tokenizer=str(tmp_path / "a"), val_fraction=0.2
    )
    manifest = prepare_dataset(config, tmp_path / "b", 1, said.append)
    assert [manifest["splits"][split]["unknown"] for split in ("train", "val")] == [80, 20]
    assert (
        "train: 1 document, 400 bytes of text, 401 tokens, 80 of them for unknown text in 1 shard"
        in said
    )


class KilledError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
@settings(max_examples=12, deadline=None)
@given(
    fatal=st.lists(st.integers(1, 12), min_size=1, max_size=4), number=st.sampled_from([30, 130])
)
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, fatal: list[int], number: int
) -> None:
    folder = tmp_path_factory.mktemp("stopped")
    write_documents(folder / "a.jsonl", number)
    config = DataConfig(input=str(folder / "a.jsonl"), tokenizer="byte", val_fraction=0.3)
    prepare_dataset(config, folder / "whole", 1, quiet)
    for at in [*fatal, 10**9]:
        with pytest.MonkeyPatch.context() as patch:
            calls = iter(range(1, 10**9))

            def stop_or(
                real: Callable[..., Any], calls: Any = calls, at: int = at
            ) -> Callable[..., Any]:
                def call(*args: Any) -> Any:
                    if next(calls) == at:
                        raise KilledError
                    return real(*args)

                return call

            patch.setattr(writer, "write_shard", stop_or(writer.write_shard))
            patch.setattr(writer, "write_json", stop_or(writer.write_json))
            try:
                prepare_dataset(config, folder / "parts", 1, quiet)
                break
            except KilledError:
                (folder / "parts" / "tmp-train-00007.safetensors").write_text("half a file")
    assert content(folder / "parts") == content(folder / "whole")


@pytest.mark.usefixtures("small_shards")
def test_stopped_before_the_manifest_it_writes_no_shard_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "a.jsonl", 130)
    config = DataConfig(input=str(tmp_path / "a.jsonl"), tokenizer="byte", val_fraction=0.3)
    prepare_dataset(config, tmp_path / "whole", 1, quiet)
    real = writer.write_json

    def write(path: Path, content: Any) -> None:
        if path.name == MANIFEST:
            raise KilledError
        real(path, content)

    monkeypatch.setattr(writer, "write_json", write)
    with pytest.raises(KilledError):
        prepare_dataset(config, tmp_path / "parts", 1, quiet)
    monkeypatch.setattr(writer, "write_json", real)
    monkeypatch.setattr(
        writer, "write_shard", lambda *_: pytest.fail("a finished shard is written again")
    )
    prepare_dataset(config, tmp_path / "parts", 1, quiet)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_leaves_no_workers_and_its_shards_are_kept(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", 3000)
    program = (
        "import sys; from dist_lm.data.prepared import encode, preparing, writer;"
        "from dist_lm.config import DataConfig;"
        "writer.SHARD_TOKENS = 20000; encode.JOB_CHARACTERS = 2000;"
        "data = DataConfig(input=sys.argv[1], tokenizer='char');"
        "preparing.prepare_dataset(data, sys.argv[2], 2)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.jsonl"), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first, second = (tmp_path / "killed" / f"train-0000{n}.safetensors" for n in (0, 1))
    while not second.exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / MANIFEST).exists()
    kept = first.stat()
    deadline = time.monotonic() + 10
    while workers := [
        p for p in Path("/proc").glob("[0-9]*") if str(tmp_path / "killed") in command_line(p)
    ]:
        assert time.monotonic() < deadline, f"{workers} live on"
        time.sleep(0.05)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "killed: going on after " in again.stderr
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    subprocess.run([*command[:-1], str(tmp_path / "whole")], capture_output=True, check=True)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def command_line(process: Path) -> str:
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        return "" if state == "Z" else (process / "cmdline").read_text()
    except OSError:
        return ""


def test_a_dead_worker_is_an_error_not_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "a.jsonl", 100)
    monkeypatch.setattr(encode, "JOB_CHARACTERS", 100)
    monkeypatch.setattr(encode, "WORKER", "import sys; sys.exit(3)")
    with pytest.raises(RuntimeError, match="an encoding process ended with exit code 3"):
        prepare_dataset(DataConfig(input=str(tmp_path), tokenizer="char"), tmp_path / "d", 2, quiet)


def test_a_worker_that_cannot_be_started_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "a.jsonl", 20)
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(
        RuntimeError, match=r"a process could not be started: .*No such file.*/no/python"
    ):
        prepare_dataset(DataConfig(input=str(tmp_path), tokenizer="char"), tmp_path / "d", 2, quiet)


# --- held out


def test_a_document_stays_where_it_is(tmp_path: Path) -> None:
    """With more documents, in another order, by another fraction: none moves into training."""
    documents = [f"document {n}" for n in range(2000)]
    small = {text for text in documents if is_held_out(text, 0.05)}
    large = {text for text in documents if is_held_out(text, 0.1)}
    assert small < large and 60 < len(small) < 140 and 150 < len(large) < 250
    assert not any(is_held_out(text, 0.0) for text in documents)
    assert document_hash(iter(["x" * 2**20, "a"]))[0] == document_hash(iter(["x" * 2**20 + "b"]))[0]


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.text(st.sampled_from("ab é\n"), min_size=1, max_size=40), min_size=1, max_size=6
    ),
    fraction=st.sampled_from([0.1, 0.3, 0.5]),
    chunk=st.integers(1, 30),
)
def test_a_small_source_holds_out_its_tail_at_a_line_end(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], fraction: float, chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("tail")
    for n, document in enumerate(texts):
        (folder / f"{n}.txt").write_bytes(document.encode())
    whole = "".join(document for document in texts if document.strip())
    config = DataConfig(input=str(folder), tokenizer="byte", val_fraction=fraction)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_lm.data.text.lines.CHUNK", chunk)
        if not whole:
            with pytest.raises(UserError, match="no document with text in"):
                prepare_dataset(config, folder / "d", 1, said.append)
            return
        prepare_dataset(config, folder / "d", 1, said.append)
    loaded = Tokenizer.load(folder / "d")
    train, val = (loaded.decode(tokens_of(folder / "d", split)) for split in ("train", "val"))
    assert train + val == whole
    assert f"the last {fraction:.1%} of text is held out, cut at a line end" in "\n".join(said)
    starts = {0}
    for document in texts:
        starts.add(max(starts) + len(document) if document.strip() else max(starts))
    ends_line = train == "" or train.endswith("\n") or len(train) in starts
    assert ends_line, (train, val)


def test_the_tail_is_about_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {n} of the play\n" for n in range(5000)))
    manifest = prepare_dataset(
        DataConfig(input=str(tmp_path), tokenizer="byte"), tmp_path / "d", 1, quiet
    )
    size = {split: entry["bytes"] for split, entry in manifest["splits"].items()}
    assert size["val"] / sum(size.values()) == pytest.approx(0.1, abs=0.001)
    assert manifest["splits"]["train"]["documents"] == manifest["splits"]["val"]["documents"] == 1
    one_line = tmp_path / "one.txt"
    one_line.write_text("no line end " * 100)
    said: list[str] = []
    manifest = prepare_dataset(
        DataConfig(input=str(one_line), tokenizer="byte"), tmp_path / "e", 1, said.append
    )
    assert manifest["splits"]["val"]["tokens"] == 0 and "nothing is held out" in said[-1]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("fails_at", [1, 3, 6, 9])
def test_a_full_disk_is_one_line_that_names_the_file(fails_at: int, tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", 130)
    config = DataConfig(input=str(tmp_path / "a.jsonl"), tokenizer="byte", val_fraction=0.3)
    prepare_dataset(config, tmp_path / "whole", 1, quiet)
    calls = iter(range(1, 10**9))

    def fsync(_: int) -> None:
        if next(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(RetryableError) as raised:
            prepare_dataset(config, tmp_path / "parts", 1, quiet)
    said = r"parts/[a-z0-9_.-]+: No space left on device; the text is not prepared; the same"
    assert re.match(rf"{tmp_path}/{said}", str(raised.value)), raised.value
    prepare_dataset(config, tmp_path / "parts", 1, quiet)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", 20)
    (tmp_path / "d").write_text("")
    config = DataConfig(input=str(tmp_path / "a.jsonl"), tokenizer="byte")
    with pytest.raises(UserError, match=r"/d: File exists; the text is not prepared") as raised:
        prepare_dataset(config, tmp_path / "d", 1, quiet)
    assert raised.value.code == 2


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON: "),
        (lambda text: "[]", "must be a JSON object, not a list"),
        (lambda text: "[" * 10**5, "not usable JSON: deeper than"),
        (lambda text: text.replace('"skip": ', '"skip": -1'), "splits.train.skip=-1"),
        (lambda text: text.replace('"file": "', '"file": "../'), "splits.train.shards.0.file='../"),
        (lambda text: text.replace('"settings"', '"other"'), "settings: Field required"),
    ],
)
def test_a_torn_progress_file_is_one_line(
    change: Callable[[str], str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "a.jsonl", 130)
    config = DataConfig(input=str(tmp_path / "a.jsonl"), tokenizer="byte", val_fraction=0.3)
    monkeypatch.setattr(preparing, "write_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_dataset(config, tmp_path / "d", 1, quiet)
    progress = tmp_path / "d" / writer.PROGRESS
    progress.write_text(change(progress.read_text()))
    with pytest.raises(UserError) as raised:
        prepare_dataset(config, tmp_path / "d", 1, quiet)
    message = str(raised.value)
    assert message.startswith(f"{progress}: {said}") and raised.value.code == 65
    assert message.endswith(f"; nearest: remove {tmp_path}/d, and prepare again")


def test_a_kill_at_the_very_end_leaves_nothing_for_ever(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", 20)
    config = DataConfig(input=str(tmp_path / "a.jsonl"), tokenizer="byte")
    prepare_dataset(config, tmp_path / "d", 1, quiet)
    before = content(tmp_path / "d")
    (tmp_path / "d" / writer.PROGRESS).write_text("{}")
    prepare_dataset(config, tmp_path / "d", 1, quiet)
    assert content(tmp_path / "d") == before


# --- the folder


def test_a_finished_folder_is_used_as_it_is(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", 20)
    config = DataConfig(input=str(tmp_path / "a.jsonl"), tokenizer="byte")
    first = prepare_dataset(config, tmp_path / "d", 1, quiet)
    (tmp_path / "a.jsonl").unlink()
    said: list[str] = []
    assert prepare_dataset(config, tmp_path / "d", 1, said.append) == first
    assert said == [f"{tmp_path}/d: prepared before, used as it is"]
    for change in (
        {"tokenizer": "char"},
        {"val_fraction": 0.2},
        {"separator": "#"},
        {"text_column": "x"},
        {"input": "y"},
    ):
        name, value = next(iter(change.items()))
        before = getattr(config, name)
        message = (
            rf"/d was prepared with data\.{name}={before!r}, not {value!r};"
            " rule: one folder, one preparation;"
        )
        with pytest.raises(UserError, match=message) as raised:
            prepare_dataset(config.model_copy(update=change), tmp_path / "d", 1, quiet)
        assert raised.value.code == 65
    with pytest.raises(UserError, match=r"/d' is a prepared folder already; rule: text"):
        prepare_dataset(DataConfig(input=str(tmp_path / "d")), tmp_path / "e", 1, quiet)


def test_a_text_that_was_edited_since_is_warned_about(tmp_path: Path) -> None:
    """By its size, by its time, or because a file came or went."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("some text\n" * 50)
    data = DataConfig(input=str(text), tokenizer="byte")
    prepare_dataset(data, tmp_path / "d", 1, say=lambda line: None)

    def warnings() -> list[str]:
        said: list[str] = []
        prepare_dataset(data, tmp_path / "d", 1, say=said.append)
        return [line for line in said if line.startswith("warning: ")]

    assert warnings() == []
    (text / "a.txt").write_text("some text\n" * 51)
    (line,) = warnings()
    assert line.startswith(f"warning: {text}/a.txt is not as it was when {tmp_path}/d was prepared")
    (text / "a.txt").write_text("more text\n" * 50)
    later = (tmp_path / "d/dataset.json").stat().st_mtime + 5
    os.utime(text / "a.txt", (later, later))
    assert len(warnings()) == 1
    os.utime(text / "a.txt", (later - 10, later - 10))
    assert warnings() == []
    (text / "b.txt").write_text("new")
    assert len(warnings()) == 1
    shutil.rmtree(text)
    assert warnings() == []


def test_errors_name_the_field_of_a_named_source(tmp_path: Path) -> None:
    def prepared(**fields: Any) -> None:
        source = SourceConfig(**{"input": str(tmp_path / "a.jsonl")} | fields)
        data = DataConfig(sources={"web": source}, tokenizer="byte")
        prepare_dataset(data, tmp_path / "d", 1, quiet, "web")

    with pytest.raises(UserError, match=r"^data\.sources\.web\.input='.*/a\.jsonl': no such file"):
        prepared()
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(
        UserError, match=r"^data\.sources\.web\.input='.*': no document with text in 1 file"
    ):
        prepared()
    write_documents(tmp_path / "a.jsonl", 20)
    prepared()
    with pytest.raises(
        UserError, match=r"/d was prepared with data\.sources\.web\.text_column='text', not 'x'"
    ):
        prepared(text_column="x")


def test_text_that_changed_in_between_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "a.jsonl", 20)
    config = DataConfig(input=str(tmp_path), tokenizer="byte")
    monkeypatch.setattr(writer, "write_shard", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_dataset(config, tmp_path / "d", 1, quiet)
    write_documents(tmp_path / "a.jsonl", 21)
    with pytest.raises(
        UserError, match=r"the text changed since .* began: .*a\.jsonl.* is now .*; nearest: remove"
    ):
        prepare_dataset(config, tmp_path / "d", 1, quiet)


def test_what_is_wrong_in_a_document_is_said_with_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "LONGEST_WORD", 2**21)
    (tmp_path / "a.jsonl").write_text(
        '{"text": "ok"}\n' + json.dumps({"text": "a" * 3 * 2**20}) + "\n"
    )
    with pytest.raises(
        UserError,
        match=rf"^{tmp_path}/a.jsonl: row 2: the tokenizer cuts nowhere in 2,097,152 char",
    ):
        prepare_dataset(
            DataConfig(input=str(tmp_path), tokenizer="bpe:300"), tmp_path / "d", 1, quiet
        )


def test_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    said: list[str] = []
    sources = [TextFile("a", "a", 2_000_000), TextFile("b", "b", 6_000_000)]
    progress = Progress("prepared", Reader(SourceConfig(input="ab"), sources), said.append)
    progress.documents = 1
    reads = [(5, 500_000, 0), (10, 500_000, 0), (20, 500_000, 1), (30, 1_500_000, 1)]
    for now, more, file in reads:
        clock[0] = float(now)
        progress.add(more, file)
    assert said == [
        "prepared 1 document, 1.0 MB, 0.10 MB/s, about 70 s left",
        # The first file had 0.75 bytes of text a byte.
        "prepared 1 document, 1.5 MB, 0.07 MB/s, about 60 s left",
        "prepared 1 document, 3.0 MB, 0.10 MB/s, about 30 s left",
    ]


def test_progress_after_empty_files(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    said: list[str] = []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    reader = Reader(
        SourceConfig(input="ab"), [TextFile("a", "a", 0), TextFile("b", "b", 2_000_000)]
    )
    progress = Progress("prepared", reader, said.append)
    clock[0] = 10.0
    progress.add(1_000_000, 1)
    assert said == ["prepared 0 documents, 1.0 MB, 0.10 MB/s, about 10 s left"]


# --- the command


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dist_lm.prepare", *words], capture_output=True, text=True
    )


def test_command_prepares_verifies_and_exits_cleanly(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"body": [f"text number {n}" for n in range(200)]}), tmp_path / "a.parquet"
    )
    words = "--tokenizer byte --text-column=body --val-fraction 0.2 --processes 2".split()
    done = run("--input", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "d"), *words)
    assert (done.returncode, done.stdout) == (0, "")
    assert "train: " in done.stderr and "val: " in done.stderr
    assert json.loads((tmp_path / "d" / MANIFEST).read_text())["settings"]["text_column"] == "body"
    assert run("--verify", str(tmp_path / "d")).stdout == f"{tmp_path}/d: every hash is right\n"
    with open(tmp_path / "d" / "train-00000.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    damaged = run("--verify", str(tmp_path / "d"))
    assert damaged.returncode == 65 and damaged.stderr.startswith(
        f"error: {tmp_path}/d: damaged: train-00000.safetensors (sha256 "
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--inptu x --output d", 2, "unknown flag --inptu; did you mean --input?"),
        ("--input", 2, "--input needs a value: --input 'stdlib'"),
        ("", 2, "exactly one of --output DIR and --verify DIR must be given"),
        ("--output d --verify d", 2, "exactly one of --output DIR and --verify DIR must be given"),
        (
            "--output d --val_fraction 2",
            2,
            "command line: data.val_fraction=2 must be less than 1; nearest: 0.1",
        ),
        (
            "--output d --processes none",
            2,
            "--processes=none must be a whole number of 1 or more; nearest: 1",
        ),
        (
            "--output d --tokenizer bpe:1",
            2,
            "data.tokenizer='bpe:1': bpe:N must have at least 256 bytes",
        ),
        ("--output d --input no/such.txt", 65, "data.input='no/such.txt': no such file"),
        ("--verify d", 65, "d/dataset.json: cannot be read (No such file or directory)"),
    ],
)
def test_command_line_errors(
    words: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        prepare.main(words.split())
    assert str(raised.value).startswith(message) and raised.value.code == code
    assert not (tmp_path / "d").exists()


def test_help_names_every_flag_and_imports_nothing_heavy() -> None:
    program = "import sys; from dist_lm import prepare\n"
    program += "try: prepare.main(['--help'])\nexcept SystemExit: pass\n"
    program += "heavy = {'torch', 'datasets', 'pyarrow', 'numpy', 'tokenizers'}\n"
    program += "print([m for m in heavy if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert shown.endswith("[]\n")
    flags = "input output tokenizer text_column separator val_fraction processes verify"
    for flag in flags.split():
        assert f"--{flag}" in shown


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "prepare_dataset", interrupted)
    with pytest.raises(SystemExit, match="130"):
        prepare.main(["--output", str(tmp_path / "d")])
    assert capsys.readouterr().err == "\nstopped; the same command goes on\n"


def peak_memory(process: subprocess.Popen[str]) -> dict[str, int]:
    """MB resident at most, of a process and of each of its children, while it runs."""
    peak: dict[str, int] = {}
    while process.poll() is None:
        for task in (p for p in Path("/proc").glob("[0-9]*") if p.name.isdigit()):
            try:
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                if task.name == str(process.pid) or fields[1] == str(process.pid):
                    status = (task / "status").read_text()
                    high = int(status.partition("VmHWM:")[2].split()[0]) // 1024
                    peak[task.name] = max(peak.get(task.name, 0), high)
            except (OSError, IndexError):
                continue
        time.sleep(0.2)
    return peak


@pytest.mark.campaign
def test_a_200_mb_document_needs_less_than_a_gigabyte(tmp_path: Path) -> None:
    rng = random.Random(0)
    # In parts, because a forked child is for a moment as large as this process.
    with open(tmp_path / "a.txt", "w") as file:
        while file.tell() < 200 * 10**6:
            words = rng.choices(WORDS, k=10**5)
            words += [f"{rng.getrandbits(40):x}" for _ in range(10**4)]  # many distinct ones
            file.write(" ".join(words) + "\n")
    words = ["--input", str(tmp_path), "--output", str(tmp_path / "d"), "--tokenizer", "bpe:1000"]
    command = [sys.executable, "-m", "dist_lm.prepare", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True)
    peak = peak_memory(process)
    assert process.returncode == 0
    assert len(peak) == 1 + len(os.sched_getaffinity(0)) and max(peak.values()) < 1024, peak
    splits = json.loads((tmp_path / "d" / MANIFEST).read_text())["splits"]
    assert sum(split["bytes"] for split in splits.values()) == (tmp_path / "a.txt").stat().st_size


def prepare_with(folder: Path, *words: str) -> dict[str, Any]:
    """What `prepare` says of a folder, after it has prepared it in this process."""
    prepare.main(["--output", str(folder), "--tokenizer", "byte", "--processes", "1", *words])
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return found


def test_prepare_takes_the_settings_of_training(tmp_path: Path, capsys: Any) -> None:
    rows = [{"title": f"t{n}", "body": f"b{n}", "lang": "de" if n % 3 else "en"} for n in range(9)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:6], "{broken", *lines[6:]]))
    (tmp_path / "b.jsonl").write_text(json.dumps({"title": "x", "body": "y", "lang": "en"}))
    template = ("--template", "{title}: {body}", "--filter", "{lang: en}", "--bad_rows", "skip")
    inputs = ("--input", str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl"))
    manifest = prepare_with(tmp_path / "d", *inputs, *template, "--val_fraction", "0")
    assert manifest["skipped"] == {"bad rows": 1, "filtered rows": 6}
    assert "skipped: 1 bad row, 6 filtered rows" in capsys.readouterr().err
    loaded = Tokenizer.load(tmp_path / "d")
    text = loaded.decode(tokens_of(tmp_path / "d", "train"), skip_special=False)
    assert text.split(loaded.eot_token) == ["x: y", "t0: b0", "t3: b3", "t6: b6", ""]
    (tmp_path / "my.yaml").write_text(
        f"data: {{input: {tmp_path}/b.jsonl, text_column: body, val_fraction: 0}}\n"
        "model: {layers: 1}\n"
    )
    manifest = prepare_with(tmp_path / "e", "--config", str(tmp_path / "my.yaml"))
    assert manifest["splits"]["train"]["tokens"] == 2
    # Again with other settings: one folder, one preparation.
    with pytest.raises(UserError, match=r"was prepared with data.template='{title}: {body}', not"):
        prepare_with(tmp_path / "d", *inputs, "--val_fraction", "0")


def test_prepare_makes_a_folder_of_each_named_source(tmp_path: Path) -> None:
    for name, word in (("a", "apple "), ("b", "berry ")):
        (tmp_path / f"{name}.txt").write_text(word * 200)
    sources = {name: {"input": str(tmp_path / f"{name}.txt")} for name in "ab"}
    words = ["--output", str(tmp_path / "d"), "--tokenizer", "bpe:270", "--processes", "1"]
    prepare.main([*words, "--sources", json.dumps(sources)])
    learned = Tokenizer.load(tmp_path / "d")
    for name, word in (("a", "apple"), ("b", "berry")):
        folder = tmp_path / "d" / name
        assert Tokenizer.load(folder).sha256 == learned.sha256
        assert word in learned.decode(tokens_of(folder, "train"))
