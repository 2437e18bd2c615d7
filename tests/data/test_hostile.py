"""A prepared folder from a stranger is refused in one line.

It opens, makes and deletes nothing outside of its folder.
"""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_lm.checks.inputs import compare_tokenizers
from dist_lm.config import Config, DataConfig
from dist_lm.data import groundwork
from dist_lm.data.prepared.cache import ShardCache
from dist_lm.data.prepared.kept import read_hashes
from dist_lm.data.prepared.manifest import MANIFEST, read_manifest
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.prepared.shards import TokenShards, verify
from dist_lm.errors import UserError
from tests.data.test_shards import make
from tests.procs import ROOT, clean_env

SHARD = "train-00000.safetensors"
HASH = "0" * 64
Edit = Callable[[dict[str, Any]], object]

opened: list[str] = []
is_watching = False


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if is_watching and event == "open":
        path = arguments[0]
        opened.append("" if isinstance(path, int) else os.fsdecode(path))


sys.addaudithook(_note)  # it can never be removed, so it does nothing unless a test watches


@pytest.fixture
def watch() -> Iterator[list[str]]:
    """The paths that this process opens from here on."""
    global is_watching
    opened.clear()
    is_watching = True
    yield opened
    is_watching = False


def edit_manifest(folder: Path, change: Edit) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def entry(manifest: dict[str, Any]) -> dict[str, Any]:
    """The first shard of a manifest."""
    found: dict[str, Any] = manifest["splits"]["train"]["shards"][0]
    return found


def shard_with(**values: Any) -> Edit:
    return lambda manifest: entry(manifest).update(values)


def tokenizer_with(**values: Any) -> Edit:
    return lambda manifest: manifest["tokenizer"].update(values)


def train_with(**values: Any) -> Edit:
    return lambda manifest: manifest["splits"]["train"].update(values)


MANIFEST_EDITS: dict[str, tuple[Edit, str]] = {
    "absolute name": (
        shard_with(file="/etc/passwd"),
        "splits.train.shards.0.file='/etc/passwd': must match [A-Za-z0-9_]",
    ),
    "name with dots": (
        shard_with(file="../../etc/passwd"),
        "splits.train.shards.0.file='../../etc/passwd': must match",
    ),
    "parent": (shard_with(file=".."), "splits.train.shards.0.file='..': must match"),
    "name with a line": (
        shard_with(file=f"{SHARD}\n"),
        "splits.train.shards.0.file='train-00000.safetensors\\n': must",
    ),
    "name with a zero": (
        shard_with(file="a\0b"),
        "splits.train.shards.0.file='a\\x00b': must match",
    ),
    "name as a query": (shard_with(file="a?b"), "splits.train.shards.0.file='a?b': must match"),
    "long name": (shard_with(file="a" * 201), "String should have at most 200 characters"),
    "name is a number": (
        shard_with(file=5),
        "splits.train.shards.0.file=5: Input should be a valid string",
    ),
    "no name": (
        lambda manifest: entry(manifest).pop("file"),
        "splits.train.shards.0.file: Field required",
    ),
    "hash is a path": (
        shard_with(sha256="/tmp/victim/a"),
        "splits.train.shards.0.sha256='/tmp/victim/a': must match",
    ),
    "hash in capitals": (shard_with(sha256="A" * 64), "must match [0-9a-f]{64}"),
    "hash of the tokenizer": (
        tokenizer_with(sha256="../x"),
        "tokenizer.sha256='../x': must match [0-9a-f]{64}",
    ),
    "no tokens": (
        shard_with(tokens=-1),
        "splits.train.shards.0.tokens=-1: Input should be greater than or equal to 0",
    ),
    "endless tokens": (
        shard_with(tokens=10**30),
        "not usable JSON: 1000000000000000000000000000000 is not a number of 64 bits",
    ),
    "more tokens than a count": (
        shard_with(tokens=2**48 + 1),
        "splits.train.shards.0.tokens=281474976710657: Input should be less",
    ),
    "half a token": (
        shard_with(tokens=40.5),
        "splits.train.shards.0.tokens=40.5: Input should be a valid integer",
    ),
    "tokens are true": (
        shard_with(tokens=True),
        "splits.train.shards.0.tokens=True: Input should be a valid integer",
    ),
    "tokens are text": (
        shard_with(tokens="40"),
        "splits.train.shards.0.tokens='40': Input should be a valid integer",
    ),
    "bytes are text": (
        shard_with(bytes="x"),
        "splits.train.shards.0.bytes='x': Input should be a valid integer",
    ),
    "another sum": (train_with(tokens=7), "tokens=7 must be the 80 of all its shards"),
    "dtype of objects": (
        tokenizer_with(dtype="O"),
        "tokenizer.dtype='O': Input should be 'uint16' or 'uint32'",
    ),
    "endless dtype": (
        tokenizer_with(dtype="V999999999"),
        "tokenizer.dtype='V999999999': Input should be 'uint16' or",
    ),
    "endless vocabulary": (
        tokenizer_with(vocab_size=10**12),
        "tokenizer.vocab_size=1000000000000: Input should be less",
    ),
    "vocabulary in words": (
        tokenizer_with(vocab_size="many"),
        "tokenizer.vocab_size='many': Input should be a valid int",
    ),
    "shards are a number": (
        train_with(shards=3),
        "splits.train.shards=3: Input should be a valid list",
    ),
    "a shard is a number": (train_with(shards=[3]), "splits.train.shards.0=3: Input should be"),
    "no splits": (lambda manifest: manifest.pop("splits"), "splits: Field required"),
    "other splits": (
        lambda manifest: manifest.update(splits={"test": {}}),
        "splits.train: Field required",
    ),
    "splits are a list": (
        lambda manifest: manifest.update(splits=[]),
        "splits=[]: Input should be",
    ),
    "no tokenizer": (lambda manifest: manifest.pop("tokenizer"), "tokenizer: Field required"),
    "nameless source": (
        lambda manifest: manifest.update(sources=[{"bytes": 1}]),
        "sources.0.name: Field required",
    ),
    "sources are text": (
        lambda manifest: manifest.update(sources="a"),
        "sources='a': Input should be a valid list",
    ),
    "settings are a list": (
        lambda manifest: manifest.update(settings=[1]),
        "settings=[1]: Input should be a valid dict",
    ),
    "another format": (
        lambda manifest: manifest.update(format=[[]]),
        "format [[]] is not the format 1 of this version",
    ),
}

WHOLE_MANIFESTS = {
    "[]": "not a manifest but a list",
    '"text"': "not a manifest but a str",
    "[" * 10**5: "not usable JSON: deeper than 64 levels",
    '{"format":' * 10**5: "not usable JSON: deeper than 64 levels",
    '{"format": ' + "1" * 5000: "not usable JSON: Exceeds the limit (4300 digits)",
    "\x00": "not valid JSON: Expecting value",
}


def refused(action: Callable[[], object], *said: str) -> None:
    """The action is refused as bad data, in one line that holds these texts."""
    with pytest.raises(UserError) as raised:
        action()
    message = str(raised.value)
    assert raised.value.code == 65 and "\n" not in message and len(message) < 600, message
    for part in said:
        assert part in message, message


def use(folder: str | Path, cache: ShardCache | None = None) -> None:
    """Read all that there is in a prepared folder."""
    shards = TokenShards(folder, "train", cache)
    sequences = np.arange(sum(shards.counts(9, 9)))
    shards.read(sequences, 9, 9)
    for sequence in sequences.tolist():
        shards.documents_of(sequence, 9, 9)


def check_watch(watch: list[str], folder: Path) -> None:
    """Only files in the folder were opened; its manifest was, so the watch works."""
    assert str(folder / MANIFEST) in watch
    for path in watch:
        is_code = path.endswith((".py", ".pyc"))
        if path.startswith(("/", "..")) and not is_code:
            assert os.path.realpath(path).startswith(f"{folder}/"), path


@pytest.mark.parametrize("name", MANIFEST_EDITS)
def test_a_manifest_that_was_edited(name: str, tmp_path: Path, watch: list[str]) -> None:
    change, said = MANIFEST_EDITS[name]
    make(tmp_path / "p", [40, 40])
    edit_manifest(tmp_path / "p", change)
    watch.clear()
    for action in (use, verify, read_manifest):
        refused(functools.partial(action, tmp_path / "p"), f"{tmp_path}/p/dataset.json: ", said)
    check_watch(watch, tmp_path / "p")


@pytest.mark.parametrize("number", range(len(WHOLE_MANIFESTS)))
def test_a_manifest_of_another_shape(number: int, tmp_path: Path) -> None:
    content, said = list(WHOLE_MANIFESTS.items())[number]
    make(tmp_path, [40])
    (tmp_path / MANIFEST).write_text(content)
    refused(lambda: use(tmp_path), f"{tmp_path}/dataset.json: {said}")


def test_a_manifest_that_is_no_file_or_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    refused(
        lambda: read_manifest(tmp_path),
        f"{tmp_path}/dataset.json: cannot be read (not a regular file)",
    )
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).touch()
    os.truncate(tmp_path / MANIFEST, 2**28 + 1)
    refused(
        lambda: read_manifest(tmp_path), f"{tmp_path}/dataset.json: has more than 268,435,456 bytes"
    )


def test_many_faults_are_not_collected(tmp_path: Path) -> None:
    """The first one ends the check: a list of millions of them would fill the memory."""
    make(tmp_path, [40])
    edit_manifest(tmp_path, lambda manifest: manifest.update(sources=[0] * 10**5))
    with pytest.raises(UserError, match=r"sources\.0=0: Input should be") as raised:
        read_manifest(tmp_path)
    assert raised.value.__cause__.error_count() == 1  # type: ignore[union-attr]


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a shard, and what follows it."""
    base = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:base]), raw[base:]


def with_header(text: bytes, length: int | None = None) -> Callable[[bytes], bytes]:
    """A shard with another header, perhaps with a false length of it."""

    def change(raw: bytes) -> bytes:
        _, rest = header_of(raw)
        return (len(text) if length is None else length).to_bytes(8, "little") + text + rest

    return change


def with_tensor(name: str, **values: Any) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        header, _ = header_of(raw)
        header[name] |= values
        return with_header(json.dumps(header).encode())(raw)

    return change


def without(name: str) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        header, _ = header_of(raw)
        del header[name]
        return with_header(json.dumps(header).encode())(raw)

    return change


def with_value(name: str, index: int, value: int) -> Callable[[bytes], bytes]:
    """A shard with another number in one of the columns of its documents."""

    def change(raw: bytes) -> bytes:
        header, rest = header_of(raw)
        at = len(raw) - len(rest) + header[name]["data_offsets"][0] + 8 * index
        return raw[:at] + value.to_bytes(8, "little", signed=True) + raw[at + 8 :]

    return change


def with_column(name: str, values: list[int]) -> Callable[[bytes], bytes]:
    """A shard with other numbers in a column of its documents."""

    def change(raw: bytes) -> bytes:
        for index, value in enumerate(values):
            raw = with_value(name, index, value)(raw)
        return raw

    return change


# A shard of 40 tokens: three columns of 6 documents, 48 bytes each, then 80 bytes of tokens.
SHARD_EDITS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "0 bytes are no safetensors file"),
    "cut in the length": (lambda raw: raw[:7], "7 bytes are no safetensors file"),
    "cut in the header": (lambda raw: raw[:100], "its header has"),
    "cut in the tokens": (
        lambda raw: raw[:-1],
        "tokens: bytes 144 to 224 are not 40 of U16 in the file",
    ),
    "another file": (
        lambda raw: b"root:x:0:0:root:/root:/bin/bash\n" * 9,
        "its header has 3475222254926655346 bytes",
    ),
    "endless header": (
        with_header(b"{}", 2**64 - 1),
        "its header has 18446744073709551615 bytes of",
    ),
    "large header": (with_header(b"{}" + b" " * 2**17), "its header has 131074 bytes of"),
    "no JSON": (with_header(b"{"), "not valid JSON"),
    "deep": (with_header(b"[" * 60000), "not usable JSON: deeper than 64 levels"),
    "a list": (with_header(b"[]"), "Input should be a valid dictionary"),
    "no tokens": (without("tokens"), "tokens: Field required"),
    "no documents": (without("document_row"), "document_row: Field required"),
    "unknown dtype": (
        with_tensor("tokens", dtype="O"),
        "tokens.dtype='O': Input should be 'U16', 'U32' or 'I64'",
    ),
    "another dtype": (
        with_tensor("tokens", dtype="U32", shape=[20]),
        "20 tokens of uint32 where dataset.json has 40",
    ),
    "fewer tokens": (
        with_tensor("tokens", shape=[39], data_offsets=[144, 222]),
        "39 tokens of uint16 where dataset.json",
    ),
    "two dimensions": (with_tensor("tokens", shape=[4, 10]), "tokens.shape=[4, 10]: "),
    "no dimension": (
        with_tensor("tokens", shape=[]),
        "tokens.shape=[]: List should have at least 1 item",
    ),
    "negative shape": (
        with_tensor("tokens", shape=[-1]),
        "tokens.shape.0=-1: Input should be greater than or equal to 0",
    ),
    "endless shape": (
        with_tensor("tokens", shape=[2**40]),
        "tokens: bytes 144 to 224 are not 1099511627776 of U16",
    ),
    "shape is text": (
        with_tensor("tokens", shape="40"),
        "tokens.shape='40': Input should be a valid list",
    ),
    "offsets behind the end": (
        with_tensor("tokens", data_offsets=[9000, 9080]),
        "tokens: bytes 9000 to 9080 are not 40",
    ),
    "negative offsets": (
        with_tensor("tokens", data_offsets=[-80, 0]),
        "tokens.data_offsets.0=-80: Input should be",
    ),
    "offsets turned round": (
        with_tensor("tokens", data_offsets=[224, 144]),
        "tokens: bytes 224 to 144 are not 40 of U16",
    ),
    "offsets and shape differ": (
        with_tensor("tokens", data_offsets=[144, 222]),
        "tokens: bytes 144 to 222 are not 40",
    ),
    "columns differ": (
        with_tensor("document_row", shape=[5], data_offsets=[96, 136]),
        "its documents do not follow each",
    ),
    "unknown source": (
        with_value("document_source", 2, 1),
        "a document is from none of the 1 sources",
    ),
    "negative source": (
        with_value("document_source", 2, -1),
        "a document is from none of the 1 sources",
    ),
    "documents go back": (
        with_value("document_start", 2, 3),
        "its documents do not follow each other",
    ),
    "documents go round": (  # each difference to the one before is positive in 64 bits
        with_column("document_start", [0, 2**62, -(2**63), -(2**62), 5, 35]),
        "its documents do not follow each other",
    ),
    "begins late": (with_value("document_start", 0, 1), "its documents do not follow each other"),
    "begins behind the end": (
        with_value("document_start", 5, 40),
        "its documents do not follow each other",
    ),
}


@pytest.mark.parametrize("name", SHARD_EDITS)
def test_a_shard_that_was_edited(name: str, tmp_path: Path) -> None:
    change, said = SHARD_EDITS[name]
    make(tmp_path, [40, 40])
    edited = change((tmp_path / SHARD).read_bytes())
    (tmp_path / SHARD).write_bytes(edited)
    edit_manifest(tmp_path, shard_with(bytes=len(edited)))
    refused(
        lambda: use(tmp_path),
        f"{tmp_path}/{SHARD}: not a shard as it was prepared: {said}",
        "; nearest: prepare again",
    )


def test_a_folder_that_nobody_edited_is_read(tmp_path: Path, watch: list[str]) -> None:
    make(tmp_path / "p", [40, 40])
    edit_manifest(tmp_path / "p", lambda manifest: None)
    shard = tmp_path / "p" / SHARD
    shard.write_bytes(with_tensor("tokens")(shard.read_bytes()))
    edit_manifest(tmp_path / "p", shard_with(bytes=shard.stat().st_size))
    watch.clear()
    use(tmp_path / "p")
    check_watch(watch, tmp_path / "p")
    assert str(tmp_path / "p" / SHARD) in watch


def test_a_manifest_without_settings(prepared: Path, tmp_path: Path) -> None:
    """A stream's kept validation has none."""
    folder = shutil.copytree(prepared, tmp_path / "p")
    edit_manifest(folder, lambda manifest: manifest.pop("settings"))
    data = {"input": str(folder), "tokenizer": "byte"}
    (tmp_path / "a.txt").write_text("text")
    again = DataConfig.model_validate(data | {"input": str(tmp_path / "a.txt")})
    refused(
        lambda: prepare_dataset(again, folder, 1),
        f"{folder} was prepared with data.input=None, not ",
    )
    config = Config.model_validate(
        {"data": data, "run": {"dir": str(tmp_path / "run"), "steps": 1}}
    )
    assert compare_tokenizers(config) == ("257 tokens", False)


@pytest.mark.slow
def test_the_command_exits_as_data_in_one_line(tmp_path: Path) -> None:
    make(tmp_path, [40, 40])
    edit_manifest(tmp_path, shard_with(file="/etc/passwd"))
    command = [sys.executable, "-m", "dist_lm.prepare", "--verify", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 65 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}/dataset.json: ")
    assert done.stderr.count("\n") == 1


# --- what a run keeps of its data


@pytest.mark.parametrize("content", ["{", "{}", '["x"]', "[true]", "[" * 10**5, "[1e3]"])
def test_damaged_hashes_of_validation(content: str, tmp_path: Path) -> None:
    (tmp_path / "documents.json").write_text(content)
    said = f"{tmp_path}/documents.json: "
    refused(lambda: read_hashes(tmp_path / "documents.json"), said, f"remove {tmp_path}, which")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a": 1}', '{"a": [["x"]]}', '{"a": [["x", "y", "z", "m"]]}']
)
def test_a_damaged_record_of_streams(content: str, tmp_path: Path) -> None:
    (tmp_path / "streams.json").write_text(content)
    said = f"{tmp_path}/streams.json: "
    refused(lambda: groundwork._read_record(tmp_path / "streams.json"), said, "a new run.dir")


def test_names_from_outside_reach_no_terminal_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "\x1b[2Ja.txt").write_text("some text to train on\n" * 20)
    data = DataConfig(input=str(tmp_path / "\x1b[2Ja.txt"), tokenizer="byte")
    prepare_dataset(data, tmp_path / "p")
    printed = capsys.readouterr().err
    assert r"\x1b[2Ja.txt" in printed and "\x1b" not in printed


# --- a prepared folder at a URL


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """A web server of a folder, and its address."""
    running = []

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def tree(folder: Path, without: Path) -> dict[str, bytes | None]:
    """All files and folders below a folder but those of another one, with what is in them."""
    contents: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        if without not in path.parents:
            contents[str(path)] = path.read_bytes() if path.is_file() else None
    return contents


# The victim lies at ../../home/a-notes.txt as the cache sees it.
HOSTILE_SHARDS = {
    "hash leads to the victim": {"sha256": "../../home/a", "file": "notes.txt"},
    "hash and name lead out": {"sha256": "../../home/a", "file": "../../../home/a-notes.txt"},
    "name leads to the victim": {"sha256": HASH, "file": "../../../home/a-notes.txt"},
    "name makes a file": {"sha256": HASH, "file": "../../esc/../q"},
    "hash makes a file": {"sha256": "../", "file": "q"},
    "absolute name": {"sha256": HASH, "file": "/etc/passwd"},
}


@pytest.mark.parametrize("name", HOSTILE_SHARDS)
@pytest.mark.parametrize("size", [40, 10**6])
def test_a_hostile_url_touches_nothing_outside_the_cache(
    name: str, size: int, tmp_path: Path, serve: Callable[[Path], str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a-notes.txt").write_text("the only copy")
    make(tmp_path / "far", [40, 40])
    edit_manifest(tmp_path / "far", shard_with(bytes=size, **HOSTILE_SHARDS[name]))
    url = serve(tmp_path / "far")
    cache = tmp_path / "some" / "cache"
    (tmp_path / "some").mkdir()
    before = tree(tmp_path, cache) | {str(cache): None}
    with contextlib.suppress(Exception):  # whatever it says: the files come first
        use(url, ShardCache(url, cache, 10**9))
    assert tree(tmp_path, cache) == before
    assert [path.name for path in cache.iterdir()] == ["lock"]
    refused(lambda: use(url, ShardCache(url, cache, 10**9)), f"{url}/dataset.json: ", "must match")
    refused(lambda: verify(url), f"{url}/dataset.json: ", "must match")


def test_a_cache_takes_no_name_that_leads_out(tmp_path: Path) -> None:
    """Even if a caller did not check it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a-notes.txt").write_text("the only copy")
    cache = ShardCache(f"file://{tmp_path}/far", tmp_path / "some" / "cache", 10**9)
    before = tree(tmp_path, cache.folder)
    for wanted in HOSTILE_SHARDS.values():
        with pytest.raises(AssertionError, match="lead out of no folder"):
            cache.get(wanted["file"], 40, wanted["sha256"])
    assert tree(tmp_path, cache.folder) == before


def test_an_honest_url_is_read(tmp_path: Path, serve: Callable[[Path], str]) -> None:
    make(tmp_path / "far", [40, 40])
    url = serve(tmp_path / "far")
    use(url, ShardCache(url, tmp_path / "cache", 10**9))
    assert verify(url) == []
