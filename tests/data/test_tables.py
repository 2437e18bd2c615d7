"""Damaged and hostile tables: refused by name, whatever pyarrow does over them."""

import gzip
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_lm.config import SourceConfig
from dist_lm.data.text import files, table_file
from dist_lm.data.text.files import find_files
from dist_lm.data.text.formats import Reader
from dist_lm.errors import UserError
from tests.procs import ROOT, clean_env

# What replaces a function of the process that parses, by name.
CRASH = "lambda batches: os.kill(os.getpid(), signal.{})"
PROGRAM = (
    "import os, signal, sys, time; from dist_lm.data.text import table_parser;"
    " table_parser.{name} = {value}; table_parser.serve(int(sys.argv[1]))"
)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Processes that were started before are not used, nor are those of this test later."""
    monkeypatch.setattr(table_file, "_idle", [])
    return monkeypatch


def write_arrow(path: Path, texts: list[str], last_offset: int | None = None) -> None:
    """An Arrow file, perhaps with another end of its last text."""
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"text": texts})
    with pa.ipc.new_file(sink, batch.schema) as file:
        file.write_batch(batch)
    raw = sink.getvalue().to_pybytes()
    if last_offset is not None:
        offsets = batch.column("text").buffers()[1].to_pybytes()[: 4 * len(texts) + 4]
        assert raw.count(offsets) == 1
        changed = offsets[:-4] + last_offset.to_bytes(4, "little", signed=True)
        raw = raw.replace(offsets, changed)
    path.write_bytes(raw)


def read(folder: Path, bad_rows: str = "error") -> tuple[list[str], Counter[str]]:
    source = SourceConfig(input=str(folder))
    skipped: Counter[str] = Counter()
    reader = Reader(source, find_files(source), bad_rows)
    texts = ["".join(texts) for _, _, texts in reader.documents(skipped)]
    return texts, skipped


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        read(folder)
    message = str(raised.value)
    assert raised.value.code == 65 and message.isprintable() and len(message) < 400, message
    return message


@pytest.mark.parametrize("last_offset", [-5, 47, 500, 30_000_000, 2**31 - 1])
def test_an_arrow_file_whose_offsets_lead_out(last_offset: int, tmp_path: Path) -> None:
    write_arrow(tmp_path / "a.arrow", ["secret"] * 8, last_offset)
    write_arrow(tmp_path / "b.arrow", ["fine"])
    if last_offset == 47:  # within its memory, so only one letter is lost
        assert read(tmp_path)[0] == ["secret"] * 7 + ["secre", "fine"]
        return
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path}/a.arrow: row 1: ") and "crashes" not in message
    assert read(tmp_path, "skip") == (["fine"], {"rests of damaged files": 1})


def test_indices_behind_a_dictionary(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(
        pa.array([0, 1, 7], pa.int8()), pa.array(["a", "b"]), safe=False
    )
    batch = pa.record_batch({"text": column})
    with pa.ipc.new_file(tmp_path / "a.arrow", batch.schema) as file:
        file.write_batch(batch)
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path}/a.arrow: row 1: ") and "crashes" not in message


def test_a_packed_table_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_arrow(tmp_path / "a.arrow", ["x" * 2**20] * 4)
    packed = gzip.compress((tmp_path / "a.arrow").read_bytes(), 9)
    (tmp_path / "a.arrow").unlink()
    (tmp_path / "a.arrow.gz").write_bytes(packed)
    assert len(read(tmp_path)[0]) == 4
    monkeypatch.setattr(files, "_UNPACKED_BASE", 2**16)
    most = 2**16 + 200 * len(packed)
    assert refused(tmp_path) == (
        f"{tmp_path}/a.arrow.gz: unpacks to more than {most:,} bytes; nearest: unpack it yourself"
    )


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_crash_is_a_damaged_file(
    ending: str, name: str, tmp_path: Path, fresh: pytest.MonkeyPatch
) -> None:
    if ending == ".parquet":
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    else:
        write_arrow(tmp_path / "a.arrow", ["a"])
    (tmp_path / "b.txt").write_text("fine")
    program = PROGRAM.format(name="_next", value=CRASH.format(name))
    fresh.setattr(table_file, "_PROGRAM", program)
    said = f"a{ending}: row 1: damaged: it crashes the process that reads it ({name})"
    assert refused(tmp_path) == f"{tmp_path}/{said}"
    assert read(tmp_path, "skip") == (["fine"], {"rests of damaged files": 1})
    assert table_file._idle == []


def test_a_crash_while_opening(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    value = "lambda pipe, request: os.kill(os.getpid(), signal.SIGSEGV)"
    fresh.setattr(table_file, "_PROGRAM", PROGRAM.format(name="_open", value=value))
    said = "a.parquet: damaged: it crashes the process that reads it (SIGSEGV)"
    assert refused(tmp_path) == f"{tmp_path}/{said}"
    source = SourceConfig(input=str(tmp_path))
    with pytest.raises(UserError, match=r"a\.parquet: damaged: it crashes the process"):
        Reader(source, find_files(source)).parts(lanes=2)


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_a_process_that_was_killed_is_no_damage(
    bad_rows: str, tmp_path: Path, fresh: pytest.MonkeyPatch
) -> None:
    """The system may do that where memory is short; the file must not be left out for it."""
    write_arrow(tmp_path / "a.arrow", ["a"])
    program = PROGRAM.format(name="_next", value=CRASH.format("SIGKILL"))
    fresh.setattr(table_file, "_PROGRAM", program)
    with pytest.raises(UserError, match=r"a\.arrow: row 1: the process .* ended with .*-9"):
        read(tmp_path, bad_rows)


def test_memory_and_time_are_bounded(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    write_arrow(tmp_path / "a.arrow", ["x"] * 100)
    value = "lambda batches: (b'batch', bytearray(5 * 2**30))"
    fresh.setattr(table_file, "_PROGRAM", PROGRAM.format(name="_next", value=value))
    assert refused(tmp_path).endswith("a.arrow: row 1: reading it needs more than 4 GB of memory")
    fresh.setattr(table_file, "_idle", [])
    value = "lambda batches: [0 for _ in iter(int, 1)]; table_parser.CPU_SECONDS = 1"
    fresh.setattr(table_file, "_PROGRAM", PROGRAM.format(name="_next", value=value))
    assert refused(tmp_path).endswith("a.arrow: row 1: damaged: reading it takes too long")


def test_a_process_is_used_again(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    for number in range(3):
        texts = [f"{number} {row}" for row in range(300)]
        table = pa.table({"text": texts, "other": texts})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=100)
        write_arrow(tmp_path / f"{number}.arrow", texts)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" * 9)
    before = set(table_file._all)
    texts, skipped = read(tmp_path, "skip")
    assert len(texts) == 1800 and skipped == {"rests of damaged files": 1}
    assert len(table_file._idle) == 1 and set(table_file._all) - before == set(table_file._idle)
    source = SourceConfig(input=str(tmp_path))
    documents = Reader(source, find_files(source)).documents(Counter())
    assert next(documents)[1] == 1
    assert table_file._idle == []
    del documents  # given up in the middle of a file
    assert len(table_file._idle) == 1


def is_gone(process: int) -> bool:
    try:
        return " Z " in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_no_process_stays_behind(tmp_path: Path) -> None:
    """Not after an exit in the middle of a file, nor after a kill."""
    write_arrow(tmp_path / "a.arrow", ["x"] * 100)
    code = (
        "import os, sys; from collections import Counter;"
        " from dist_lm.config import SourceConfig;"
        " from dist_lm.data.text import table_file; from dist_lm.data.text.files import find_files;"
        " from dist_lm.data.text.formats import Reader;"
        f" source = SourceConfig(input={str(tmp_path)!r});"
        " documents = Reader(source, find_files(source)).documents(Counter());"
        " next(documents); print(*[parser.process.pid for parser in table_file._all], flush=True);"
    )
    for ending in ("", "os.kill(os.getpid(), 9)"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code + ending],
            cwd=ROOT,
            env=clean_env(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stderr == ""
        (process,) = map(int, done.stdout.split())
        deadline = time.monotonic() + 30
        while not is_gone(process):
            assert time.monotonic() < deadline, "it is still there"
            time.sleep(0.05)


def test_a_parser_starts_without_numpy(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    """It doubles the time of a start, and a stream starts one parser for each lane."""
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert read(tmp_path)[0] == ["a", "b"]
    (parser,) = table_file._idle
    mapped = Path(f"/proc/{parser.process.pid}/maps").read_text()
    assert "pyarrow" in mapped
    assert "numpy" not in mapped
