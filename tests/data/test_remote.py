"""Files at URLs are found, and read through failures.

The cache is bounded, shared and checked, and survives kill -9.
"""

import errno
import fcntl
import hashlib
import http.server
import importlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from dist_lm.data import remote
from dist_lm.data.prepared import cache as cache_module
from dist_lm.data.prepared.cache import ShardCache
from dist_lm.data.prepared.manifest import find_prepared, read_manifest
from dist_lm.data.prepared.shards import TokenShards, verify
from dist_lm.data.remote import ChangedError, RemoteFile, fetch_small, find, is_remote, open_file
from dist_lm.errors import DataError, UserError
from tests.data.test_shards import make
from tests.objectstore import ObjectStore
from tests.procs import ROOT, clean_env

TEXTS = (".txt", ".parquet")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.3)
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    monkeypatch.setattr(cache_module, "ROOM_WAIT", 0.5)
    monkeypatch.setenv(
        "AWS_MAX_ATTEMPTS", "1"
    )  # botocore's own tries, which come before each of ours
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, bytes]], ObjectStore]]:
    """A server with these files in the bucket `bkt`."""
    import s3fs  # slow

    stores = []

    def begin(files: dict[str, bytes]) -> ObjectStore:
        store = ObjectStore(tmp_path / "store")
        (store.folder / "bkt").mkdir(parents=True)
        for name, content in files.items():
            store.put(f"bkt/{name}", content)
        stores.append(store)
        for key, value in store.env.items():
            monkeypatch.setenv(key, value)
        # The clients of s3fs keep the address of an earlier test's server.
        s3fs.S3FileSystem.clear_instance_cache()
        store.start()
        return store

    yield begin
    for store in stores:
        store.kill()
    s3fs.S3FileSystem.clear_instance_cache()


def test_which_paths_are_remote() -> None:
    urls = ["s3://b", "gs://b/x", "hf://datasets/a/b", "memory://x", "file:///x", "https://host/x"]
    assert [is_remote(url) for url in urls] == [True] * len(urls)
    paths = ["a/b", "/a", "owner/name", "stdlib", "a:b", "c:\\x", "./s3:/x", "x/s3://b", "*.txt"]
    assert [is_remote(path) for path in paths] == [False] * len(paths)


FILES = {
    "d/b.txt": b"bb",
    "d/a.txt": b"a",
    "d/e/c.txt": b"ccc",
    "d/no.bin": b"n",
    "d/.h/x.txt": b"h",
    "d/.y.txt": b"y",
    "d2/z.txt": b"zz",
}


def check_find(root: str) -> dict[str, str]:
    """Finds a folder, a glob and a file; returns the marks by name."""
    found = find(f"{root}/d", TEXTS)
    assert [(f.name, f.size) for f in found] == [("a.txt", 1), ("b.txt", 2), ("e/c.txt", 3)]
    assert find(f"{root}/d/", TEXTS) == found
    assert [open_file(f.path, f.size, f.mark).read() for f in found] == [b"a", b"bb", b"ccc"]
    assert find(f"{root}/d/**/*.txt", TEXTS) == found
    assert find(f"{root}/d/[b-z].txt", TEXTS) == found[1:2]
    assert [f.name for f in find(f"{root}/d*/?.txt", TEXTS)] == ["d/a.txt", "d/b.txt", "d2/z.txt"]
    mark = find(f"{root}/d/n*", TEXTS)[0].mark
    assert find(f"{root}/d/no.bin", TEXTS) == [
        RemoteFile("no.bin", f"{found[0].path[:-5]}no.bin", 1, mark)
    ]
    nothing = {
        "nix": "nothing is there",
        "d/nix.txt": "nothing is there",
        "d/*.gz": "no file matches",
    }
    for name, said in nothing.items():
        with pytest.raises(UserError) as raised:
            find(f"{root}/{name}", TEXTS)
        assert (
            str(raised.value) == f"data.input='{root}/{name}': {said}" and raised.value.code == 65
        )
    with pytest.raises(UserError, match=rf"data\.input='{root}/d/e': it has none of \.gz \.zst"):
        find(f"{root}/d/e", (".gz", ".zst"))
    return {f.name: f.mark for f in found}


@pytest.mark.slow
def test_files_in_an_object_store(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store = start(FILES)
    before = check_find("s3://bkt")
    with pytest.raises(UserError, match=r"^data\.input='s3://other/d': nothing is there$"):
        find("s3://other/d", TEXTS)
    assert [f.name for f in find("s3://bkt", TEXTS)] == [
        "d/a.txt",
        "d/b.txt",
        "d/e/c.txt",
        "d2/z.txt",
    ]
    address = store.client().generate_presigned_url(
        "get_object", Params={"Bucket": "bkt", "Key": "d/b.txt"}
    )
    (web,) = find(address, TEXTS)
    assert (
        "?" in address
        and web.name == "b.txt"
        and open_file(web.path, web.size, web.mark).read() == b"bb"
    )
    with pytest.raises(UserError, match=r"nix\.txt\?.*: nothing is there$"):
        find(address.replace("b.txt", "nix.txt"), TEXTS)
    store.kill()
    with pytest.raises(OSError, match=r"^http://127\.0\.0\.1:\d+/bkt/d/b\.txt: given up after"):
        open_file(address)
    capsys.readouterr()
    time.sleep(1.1)  # an object's time is in seconds
    store.start()
    assert check_find("s3://bkt") == before  # written again with the same content
    store.put("bkt/d/a.txt", b"A")
    after = {f.name: f.mark for f in find("s3://bkt/d", TEXTS)}
    assert {name for name in after if after[name] != before[name]} == {"a.txt"}
    assert find("s3://bkt/d/*.txt", TEXTS)[0].mark == after["a.txt"]  # no list is remembered
    assert capsys.readouterr().err == ""


def test_files_on_disk_and_in_memory(tmp_path: Path) -> None:
    for name, content in FILES.items():
        # A hidden folder above does not matter.
        path = tmp_path / ".cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        fsspec.filesystem("memory").pipe(f"/r/{name}", content)
    check_find(f"file://{tmp_path}/.cache")
    before = check_find("memory://r")
    shared = fsspec.filesystem("memory").store["/r/d/b.txt"]
    file = open_file("memory://r/d/b.txt")
    shared.seek(1)
    assert file.read() == b"bb" and shared.tell() == 1  # another thread may be reading it
    fsspec.filesystem("memory").pipe("/r/d/a.txt", b"A")
    assert {f.name for f in find("memory://r/d", TEXTS) if f.mark != before[f.name]} == {"a.txt"}


def test_what_a_url_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    needs = {
        "s3://b": r"s3:// needs a package: ImportError: Install s3fs to access S3"
        r" \(pip install 'dist_lm\[s3\]'\)$",
        "gs://b": r"gs:// needs a package: ImportError: Please install gcsfs to access"
        r" Google Storage$",
        "zz://b": r"Protocol not known: zz; rule: a scheme that fsspec knows, like s3, gs, hf,"
        r" https$",
    }
    for url, said in needs.items():
        with pytest.raises(UserError, match=said):
            find(url, TEXTS)
        with pytest.raises(UserError, match=said):
            open_file(url)


def test_a_web_server_without_ranges_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(100))
    (tmp_path / "no.bin").touch()
    (tmp_path / ".b.txt").touch()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            (found,) = find(f"http://127.0.0.1:{server.server_port}/", TEXTS)
            assert found.name == "a.txt" and found.size == 100
            with pytest.raises(
                OSError,
                match=rf"^{found.path}: ValueError: The HTTP server doesn't .* support range",
            ):
                file = open_file(found.path)
                file.seek(50)
                file.read()
            with pytest.raises(FileNotFoundError):
                open_file(f"{found.path}.gz")
        finally:
            server.shutdown()
            thread.join()


def check_reads(url: str, content: bytes) -> None:
    """A reader is as good as BytesIO."""
    rng = random.Random(0)
    twin = io.BytesIO(content)
    with open_file(url) as file:
        for _ in range(40):
            from_start = (rng.randrange(len(content)), io.SEEK_SET)
            from_end = (-rng.randrange(len(content)), io.SEEK_END)
            place = rng.choice([from_start, from_end])
            assert file.seek(*place) == twin.seek(*place)
            size = rng.choice([1, 100, 5_000, 300_000])
            assert file.read(size) == twin.read(size)
            assert file.readline() == twin.readline() and file.tell() == twin.tell()
        assert file.seek(len(content) + 5) and file.read(3) == b""
        assert not file.seek(0) and file.read() == content
        with pytest.raises(OSError):
            file.seek(-1)
    assert file.closed


@pytest.mark.slow
def test_reading_is_exact_in_threads_too(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK", 2**16)
    contents = {f"{n}.txt": np.random.default_rng(n).bytes(2**20 + n) for n in range(3)}
    start(contents)
    urls = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        fsspec.filesystem("memory").pipe(f"/{name}", content)
        for root in ("s3://bkt/", f"file://{tmp_path}/", "memory://"):
            urls += [(f"{root}{name}", content)] * 2
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: check_reads(*entry), urls))


@pytest.mark.slow
def test_a_server_restart_is_read_through(
    start: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "BLOCK", 2**16)
    monkeypatch.setattr(remote, "PATIENCE", 30.0)
    content = np.random.default_rng(0).bytes(2**20)
    table = pa.table({"text": [f"row {n} {'x' * 50}" for n in range(30_000)]})
    sink = io.BytesIO()
    pa.parquet.write_table(table, sink, row_group_size=1000, compression="none")
    store = start({"a.txt": content, "a.parquet": sink.getvalue()})
    file = open_file("s3://bkt/a.txt")
    rows = pa.parquet.ParquetFile(open_file("s3://bkt/a.parquet"), pre_buffer=False)
    batches = rows.iter_batches(1000, use_threads=False)
    got = file.read(100_000)
    texts = next(batches).column(0).to_pylist()
    store.kill()
    again = threading.Timer(3, store.start)
    again.start()
    begin = time.monotonic()
    try:
        got += file.read()
    finally:
        again.join()
    assert got == content and 2 < time.monotonic() - begin < 20
    for batch in batches:
        texts += batch.column(0).to_pylist()
    assert texts == table.column(0).to_pylist()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("s3://bkt/a.txt: EndpointConnectionError") and said.endswith("30 s")


@pytest.mark.slow
def test_a_server_that_stays_away_is_given_up(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 2**16)
    store = start({"a.txt": bytes(2**18)})
    file = open_file("s3://bkt/a.txt")
    file.read(10)
    store.kill()
    begin = time.monotonic()
    with pytest.raises(
        OSError,
        match=r"^s3://bkt/a\.txt: given up after [3-9]\d? tries in 1 s; the last: EndpointConn",
    ):
        file.read()
    assert time.monotonic() - begin < 3
    with pytest.raises(
        UserError, match=r"data\.input='s3://bkt': OSError: s3://bkt: given up after"
    ) as raised:
        find("s3://bkt", TEXTS)
    assert raised.value.code == 65


@pytest.mark.slow
def test_a_changed_or_vanished_file_is_not_mixed_up(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK", 2**16)
    store = start({name: bytes(2**18) for name in ("a.txt", "b.txt", "c.txt")})
    (found, *_) = find("s3://bkt/a.txt", TEXTS)
    files = {name: open_file(f"s3://bkt/{name}") for name in ("a.txt", "b.txt", "c.txt")}
    assert {len(file.read(10)) for file in files.values()} == {10}
    store.put("bkt/a.txt", b"\1" * 2**18)  # the same size, while the server runs
    with pytest.raises(
        ChangedError,
        match=r"^s3://bkt/a\.txt: changed while it was read: size and mark were \(262144, '",
    ):
        files["a.txt"].read()
    with pytest.raises(ChangedError, match="changed while"):
        open_file(found.path, found.size, found.mark)
    assert open_file(found.path).read(1) == b"\1"
    store.delete("bkt/b.txt")
    begin = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"^s3://bkt/b\.txt: no such file$"):
        files["b.txt"].read()
    store.kill()
    (store.folder / "bkt/c.txt").write_bytes(b"\1" * 2**18)
    store.start()
    with pytest.raises(ChangedError, match=r"^s3://bkt/c\.txt: changed while it was read"):
        files["c.txt"].read()
    with pytest.raises(FileNotFoundError, match=r"^s3://bkt/b\.txt: no such file$"):
        open_file("s3://bkt/b.txt")
    assert time.monotonic() - begin < 5


def test_failures_of_every_kind_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that are no OSErrors, and an answer that ends early."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/a.txt", b"0123456789" * 100)
    opened = type(memory)._open
    turns = itertools.count()
    monkeypatch.setattr(remote, "BLOCK", 100)

    class Flaky(io.RawIOBase):
        def __init__(self, raw: io.BytesIO):
            self.raw = raw

        def seek(self, *place: int) -> int:
            return self.raw.seek(*place)

        def read(self, size: int = -1) -> bytes:
            turn = next(turns) % 4
            if turn == 1:
                raise RuntimeError("no\nOSError")
            return self.raw.read(size)[: 5 if turn == 3 else None]

    monkeypatch.setattr(
        type(memory), "_open", lambda *a, **k: Flaky(io.BytesIO(opened(*a, **k).getvalue()))
    )
    with open_file("memory://a.txt") as file:
        assert b"".join(iter(lambda: file.read(7), b"")) == b"0123456789" * 100
    said = set(capsys.readouterr().err.splitlines())
    reasons = ("RuntimeError: no OSError", "OSError: 5 bytes came of 100")
    assert said == {f"memory://a.txt: {reason}; trying again for 1 s" for reason in reasons}

    def refuse(*_: Any, **__: Any) -> None:
        nonlocal calls
        calls += 1
        raise PermissionError("Access Denied")

    calls = 0
    monkeypatch.setattr(type(memory), "_open", refuse)
    with pytest.raises(OSError, match=r"^memory://a\.txt: PermissionError: Access Denied$"):
        open_file("memory://a.txt")
    assert calls == 1


def test_a_small_file_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SMALL_FILE", 2**20)
    fsspec.filesystem("memory").pipe("/fits", bytes(2**20))
    fsspec.filesystem("memory").pipe("/large", bytes(2**20 + 1))
    assert fetch_small("memory://fits") == bytes(2**20)
    with pytest.raises(
        UserError, match=r"^memory://large: larger than the 1 MB that such a file may have$"
    ):
        fetch_small("memory://large")
    for wanted in (fetch_small, lambda url: read_manifest(url.removesuffix("/dataset.json"))):
        with pytest.raises(
            UserError, match=r"^memory://nix/dataset\.json: no such file$"
        ) as raised:
            wanted("memory://nix/dataset.json")
        assert raised.value.code == 65


SIZE = 100_000


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, tuple[str, int, str]]:
    """Eight files of SIZE bytes in a folder; what `get` takes for each."""
    (tmp_path / "far").mkdir()
    entries = {}
    for n in range(8):
        content = np.random.default_rng(n).bytes(SIZE)
        (tmp_path / "far" / f"{n}").write_bytes(content)
        entries[f"{n}"] = (f"{n}", SIZE, hashlib.sha256(content).hexdigest())
    return entries


def copies(folder: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in folder.iterdir() if path.name != "lock"}


def test_the_cache_keeps_what_was_used_last(shards: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = ShardCache(f"file://{tmp_path}/far/", folder, 3 * SIZE)
    for name in "0123":
        assert cache.get(*shards[name]).read_bytes() == (tmp_path / "far" / name).read_bytes()
        cache.release(name)
    assert copies(folder) == {"1", "2", "3"}
    cache.get(*shards["1"])
    cache.release("1")
    cache.get(*shards["4"])
    assert copies(folder) == {"1", "3", "4"}
    (tmp_path / "far" / "3").unlink()
    cache.get(*shards["3"])  # not fetched again
    second = ShardCache(f"file://{tmp_path}/far", folder, 3 * SIZE)
    second.get(*shards["5"])  # 3 and 4 are in use, so the more recent 1 goes
    assert copies(folder) == {"3", "4", "5"}
    (folder / "note").write_text("not ours")  # counted, never deleted
    os.utime(folder / "note", (0, 0))
    cache.release("4")
    cache.release("3")
    second.get(*shards["6"])
    assert copies(folder) == {"", "5", "6"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3 * SIZE


def test_a_disk_that_takes_a_part_of_a_write_leaves_a_whole_copy(
    shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash is taken of what was read, so a part that is missing on the disk would stay."""
    really = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: really(file, data[:1000], at))
    cache = ShardCache(f"file://{tmp_path}/far", tmp_path / "cache", 3 * SIZE)
    copy = cache.get(*shards["0"])
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == shards["0"][2]


def test_a_cache_too_small_is_refused(shards: Any, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far"
    folder = tmp_path / "cache"
    with pytest.raises(UserError) as raised:
        ShardCache(url, folder, SIZE - 1).get(*shards["0"])
    assert str(raised.value) == (
        "data.cache_gb=9.9999e-05 has no room for 0 of 0.0001 GB; rule: the shards in use at once"
        " fit; nearest: 0.01"
    )
    cache = ShardCache(url, folder, 2 * SIZE)
    paths = [cache.get(*shards[name]) for name in "01"]
    with pytest.raises(UserError, match=r"no room for 2 of .* nearest: 0\.01"):
        cache.get(*shards["2"])
    other = ShardCache(url, folder, 2 * SIZE)
    with pytest.raises(UserError):  # after a wait, because the first cache has them in use
        other.get(*shards["2"])
    assert all(path.is_file() for path in paths)
    cache.release("0")
    cache.get(*shards["2"])
    assert copies(folder) == {"1", "2"}


def test_a_damaged_copy_is_fetched_again(shards: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def fetch() -> Path:
        cache = ShardCache(f"file://{tmp_path}/far", folder, 3 * SIZE)
        path = cache.get(*shards["0"])
        cache.release("0")
        return path

    path = fetch()
    good = path.read_bytes()
    for damaged in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), good + b"x", b""):
        path.write_bytes(damaged)
        assert fetch().read_bytes() == good
    (folder / f"tmp-{path.name}").write_bytes(b"half")  # a crash's
    (folder / "tmp-other").write_bytes(b"half")
    assert fetch() == path and copies(folder) == {"0"} and not list(folder.glob("tmp-*"))


def test_a_copy_that_another_process_has_just_finished_is_taken(
    shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking for a copy and beginning one."""
    cache = ShardCache(f"file://{tmp_path}/far", tmp_path / "cache", 3 * SIZE)
    take = ShardCache._take
    looks = []

    def look(self: ShardCache, copy: Any) -> int | None:
        found = take(self, copy)
        looks.append(found)
        if len(looks) == 1:
            ShardCache(cache.url, cache.folder, cache.limit).get(*shards["0"])
            monkeypatch.setattr(
                cache_module, "open_file", Mock(side_effect=AssertionError("fetched again"))
            )
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ShardCache, "_take", look)
        cache.get(*shards["0"])
    assert looks[0] is None and None not in looks[2:]


def test_deleting_and_beginning_wait_for_the_lock(
    shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(f"file://{tmp_path}/far", tmp_path / "cache", 3 * SIZE)
    flock = fcntl.flock
    with ThreadPoolExecutor(1) as pool:
        with cache._locked():
            got = pool.submit(cache.get, *shards["0"])
            time.sleep(0.2)
            assert copies(tmp_path / "cache") == set()
        path = got.result(10)

    def delete_first(descriptor: int, how: int) -> None:
        """As a process may between this one's opening and locking a copy."""
        if how == fcntl.LOCK_SH and path.exists():
            path.unlink()
        flock(descriptor, how)

    cache.release("0")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", delete_first)
        assert cache._take(cache._copy(*shards["0"])) is None
    assert cache.get(*shards["0"]).is_file()


def test_a_file_that_is_not_as_its_manifest_says(
    shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/far"
    folder = tmp_path / "cache"
    opened: list[str] = []
    monkeypatch.setattr(cache_module, "open_file", lambda url: opened.append(url) or open_file(url))
    cache = ShardCache(url, folder, 3 * SIZE)
    good = (tmp_path / "far" / "0").read_bytes()
    sha256 = shards["0"][2]
    wrong = [
        (bytes(SIZE), rf"sha256 \w{{12}}, not {sha256[:12]}, twice; rule: as its manifest"),
        (good[:-1], "not 100000 bytes, twice; rule: as its manifest has it; prepare again"),
        (good + bytes(10 * SIZE), "not 100000 bytes, twice"),
    ]
    for content, said in wrong:
        (tmp_path / "far" / "0").write_bytes(content)
        opened.clear()
        with pytest.raises(UserError, match=rf"{url}/0: {said}") as raised:
            cache.get(*shards["0"])
        assert raised.value.code == 65 and opened == [f"{url}/0"] * 2 and copies(folder) == set()
    (tmp_path / "far" / "0").write_bytes(good)
    with pytest.raises(DataError, match=rf"^{url}/gone: no such file$"):
        cache.get("gone", SIZE, "0" * 64)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(UserError) as raised:
        patch.setattr(os, "pwrite", Mock(side_effect=full))
        cache.get(*shards["0"])
    message = f"{folder}: the disk is full before data.cache_gb=0.0003 is; rule: it has that much"
    assert str(raised.value) == message
    assert copies(folder) == set()
    assert cache.get(*shards["0"]).read_bytes() == good


# Gets files in an order of its own, and notes each download; reads slowly when told to.
WORKER = """
import hashlib, json, os, random, sys, time
from pathlib import Path
from dist_lm.data.prepared import cache as cache_module
from dist_lm.data.remote import open_file
url, folder, log, limit, seed, pause, entries = *sys.argv[1:4], *json.loads(sys.argv[4])
opened = open_file
def open_slowly(path):
    os.write(notes, f"{path}\\n".encode())
    file = opened(path)
    read = file.read
    class Slow:
        def __enter__(self): return self
        def __exit__(self, *_): file.close()
        def read(self, size):
            time.sleep(pause)
            return read(min(size, 10_000))
    return Slow()
notes = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
cache_module.open_file = open_slowly
cache, rng = cache_module.ShardCache(url, Path(folder), limit), random.Random(seed)
for entry in entries if seed is None else rng.choices(entries, k=30):
    path = cache.get(*entry)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry[2], "not what was asked for"
    time.sleep(rng.random() * pause)
    assert path.stat().st_size == entry[1], "deleted while in use"
    cache.release(entry[0])
print("done", flush=True)
"""


def worker(
    tmp_path: Path, limit: int, seed: int | None, pause: float, entries: list[Any]
) -> subprocess.Popen[str]:
    arguments = [f"file://{tmp_path}/far", str(tmp_path / "cache"), str(tmp_path / "log")]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments, json.dumps([limit, seed, pause, entries])],
        cwd=ROOT,
        text=True,
        env=clean_env(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


class Watch:
    """The most bytes seen in a folder while it was watched."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.most = 0
        self.samples = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.stop.wait(0.001):
            total = 0
            if self.folder.is_dir():
                total = sum(map(self.size_of, os.scandir(self.folder)))
            self.most = max(self.most, total)
            self.samples += 1

    def size_of(self, entry: "os.DirEntry[str]") -> int:
        try:
            return entry.stat().st_size
        except FileNotFoundError:
            return 0

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.thread.join()


def finish(*workers: subprocess.Popen[str]) -> None:
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker_ in workers:
            worker_.kill()
            worker_.wait()
    assert outputs == ["done\n"] * len(workers), "\n".join(outputs)


@pytest.mark.slow
def test_processes_share_a_cache_within_its_limit(shards: Any, tmp_path: Path) -> None:
    entries = list(shards.values())
    limit = 3 * SIZE + 50
    with Watch(tmp_path / "cache") as watch:
        finish(*(worker(tmp_path, limit, seed, 0.003, entries) for seed in range(3)))
    assert 2 * SIZE < watch.most <= limit and watch.samples > 100
    # Some were fetched more than once, so the cache was tight.
    assert len((tmp_path / "log").read_text().splitlines()) > 8


@pytest.mark.slow
def test_a_file_is_fetched_once_for_all_processes(shards: Any, tmp_path: Path) -> None:
    entries = list(shards.values())
    finish(*(worker(tmp_path, 8 * SIZE, None, 0.01, entries) for _ in range(3)))
    fetched = (tmp_path / "log").read_text().split()
    assert sorted(fetched) == [f"file://{tmp_path}/far/{n}" for n in range(8)]


@pytest.mark.slow
def test_a_download_survives_kill_9(shards: Any, tmp_path: Path) -> None:
    """A process that waits for the killed one takes over; what that one left is removed."""
    entries = list(shards.values())
    limit = SIZE + SIZE // 2  # no room for a second file beside what a crash leaves
    with Watch(tmp_path / "cache") as watch:
        first = worker(tmp_path, limit, None, 0.5, entries[:1])
        while not list((tmp_path / "cache").glob("tmp-*")):
            assert first.poll() is None
            time.sleep(0.01)
        second = worker(tmp_path, limit, None, 0.0, entries[:1])
        time.sleep(1.5)
        assert second.poll() is None  # it waits
        first.send_signal(signal.SIGKILL)
        first.communicate()
        finish(second)
        assert len((tmp_path / "log").read_text().splitlines()) == 2
        third = worker(tmp_path, limit, None, 0.5, entries[1:2])
        while not list((tmp_path / "cache").glob("tmp-*")):
            time.sleep(0.01)
        third.send_signal(signal.SIGKILL)
        third.communicate()
        assert list((tmp_path / "cache").glob("tmp-*"))
        finish(worker(tmp_path, limit, None, 0.0, entries[2:3]))
    assert copies(tmp_path / "cache") == {"2"} and watch.most <= limit


def test_token_shards_at_a_url(tmp_path: Path) -> None:
    make(tmp_path / "far", [200] * 6)
    url = f"file://{tmp_path}/far"
    sizes = [path.stat().st_size for path in (tmp_path / "far").glob("train-*")]
    assert find_prepared(url)
    assert not find_prepared(f"file://{tmp_path}")
    assert not find_prepared("memory://nix")
    assert read_manifest(url) == read_manifest(tmp_path / "far")
    near = TokenShards(tmp_path / "far", "train")
    order = np.random.default_rng(0).permutation(sum(near.counts(9, 9)))
    for limit in (max(sizes), 2 * max(sizes) + 1, 100 * max(sizes)):
        folder = tmp_path / f"cache-{limit}"
        shards = TokenShards(url, "train", ShardCache(url, folder, limit))
        assert (shards.read(order, 9, 9) == near.read(order, 9, 9)).all()
        assert shards.documents_of(7, 9, 9) == near.documents_of(7, 9, 9)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= limit
        assert shards.cache and not any(shards.cache.held.values())
    with pytest.raises(UserError, match=r"^data\.cache_gb=1e-06 has no room for train-0"):
        TokenShards(url, "train", ShardCache(url, tmp_path / "small", 1000)).read(order, 9, 9)
    assert verify(url) == []
    (tmp_path / "far" / "tokenizer.json").write_text("{ }")
    (tmp_path / "far" / "train-00002.safetensors").unlink()
    no_file = f"train-00002.safetensors ({url}/train-00002.safetensors: no such file)"
    assert verify(url)[0].startswith("tokenizer.json (sha256 ") and verify(url)[1:] == [no_file]
    (tmp_path / "far" / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=rf"^{url}/dataset\.json: not valid JSON"):
        read_manifest(url)


@pytest.mark.slow
def test_token_shards_in_an_object_store(start: Any, tmp_path: Path) -> None:
    make(tmp_path / "far", [3000] * 4)
    start({f"p/{path.name}": path.read_bytes() for path in (tmp_path / "far").iterdir()})
    assert find_prepared("s3://bkt/p")
    assert not find_prepared("s3://bkt/q")
    assert not find_prepared("s3://nix/p")
    cache = ShardCache("s3://bkt/p", tmp_path / "cache", 20_000)
    near = TokenShards(tmp_path / "far", "train")
    far = TokenShards("s3://bkt/p", "train", cache)
    order = np.arange(sum(near.counts(9, 9)))
    assert (far.read(order, 9, 9) == near.read(order, 9, 9)).all()


@pytest.mark.parametrize(
    "url", ["reference://x.txt::file:///a.json", "Reference://", "zip://a::reference://b::s3://c/d"]
)
def test_a_reference_file_is_refused(url: str) -> None:
    """It says itself which files are read, and from where."""
    for action in (lambda: remote.find(url, TEXTS), lambda: remote.exists(url)):
        with pytest.raises(UserError, match="a reference file says itself which other files"):
            action()
