"""What a document is in each format, and in which order documents come.

What is not text is refused by file and row.
"""

import csv
import gzip
import io
import json
import os
import random
import sys
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.config import DataConfig, SourceConfig
from dist_lm.data import remote
from dist_lm.data.text import lines
from dist_lm.data.text.files import TextFile, find_files
from dist_lm.data.text.formats import Reader
from dist_lm.data.text.json_rows import JsonArray
from dist_lm.errors import UserError
from tests.conftest import WORDS

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


def read(
    path: Any, skipped: Counter[str] | None = None, **settings: Any
) -> list[tuple[str, int, str]]:
    source = SourceConfig(input=str(path), **settings)
    found = find_files(source)
    documents = Reader(source, found).documents(Counter() if skipped is None else skipped)
    return [(found[source].name, row, "".join(texts)) for source, row, texts in documents]


def texts(path: Any, **settings: Any) -> list[str]:
    return [text for _, _, text in read(path, **settings)]


def write_json_lines(path: Path, rows: list[Any]) -> Path:
    written = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in written))
    return path


def test_a_txt_file_is_one_document_with_its_newlines(tmp_path: Path) -> None:
    text = "one\r\n\n two\n\x00three\ufeff\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path / "a.txt") == [("a.txt", 1, text)]


@settings(max_examples=50, deadline=None)
@given(
    parts=st.lists(st.text(st.sampled_from("a<|>\né"), max_size=8), min_size=1, max_size=8),
    chunk=st.integers(1, 9),
)
def test_a_separator_ends_documents_wherever_chunks_end(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], chunk: int
) -> None:
    text = "<|>".join(parts)
    path = tmp_path_factory.getbasetemp() / "separated.txt"
    path.write_bytes(text.encode())
    expected = [(n, part) for n, part in enumerate(text.split("<|>"), 1) if part.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK", chunk)
        assert [(row, text) for _, row, text in read(path, separator="<|>")] == expected


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.one_of(st.none(), TEXT), max_size=12), chunk=st.sampled_from([1, 7, 2**20]))
def test_rows_come_back_from_every_format(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str | None], chunk: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    objects = [{"id": n, "text": text} for n, text in enumerate(rows)]
    write_json_lines(folder / "r.jsonl", objects)
    (folder / "r.json").write_text(json.dumps(objects, indent=1, ensure_ascii=False), "utf-8")
    pq.write_table(
        pa.table({"text": pa.array(rows, pa.string()), "id": list(range(len(rows)))}),
        folder / "r.parquet",
    )
    expected = [(row, text) for row, text in enumerate(rows, 1) if text and not text.isspace()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK", chunk)
        for name in ("r.jsonl", "r.json", "r.parquet"):
            skipped: Counter[str] = Counter()
            assert [(row, text) for _, row, text in read(folder / name, skipped)] == expected, name
            assert skipped["null rows"] == rows.count(None)
            assert sum(skipped.values()) == len(rows) - len(expected)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(TEXT, max_size=12))
def test_csv_cells_stay_the_text_they_are(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str]
) -> None:
    rows = ["007", "NA", "null", "2020-01-01", 'two\nlines, "quoted"', *rows]
    path = tmp_path_factory.getbasetemp() / "r.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["text", "id"], *([text, n] for n, text in enumerate(rows))])
    expected = [(row, text) for row, text in enumerate(rows, 1) if text and not text.isspace()]
    assert [(row, text) for _, row, text in read(path)] == expected


def test_json_rows_need_not_have_the_same_keys_and_dates_stay_text(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"text": "2020-01-01"},
        {"extra": {"a": [1]}, "text": "b"},
        "",
        {"text": "<|endoftext|>\x00"},
        "",
    ]
    expected = ["2020-01-01", "b", "<|endoftext|>\x00"]
    assert texts(write_json_lines(tmp_path / "a.jsonl", rows)) == expected
    assert texts(write_json_lines(tmp_path / "lines.json", rows)) == expected
    marked = write_json_lines(tmp_path / "b.jsonl", ['\ufeff{"body": "x"}'])
    assert texts(marked, text_column="body") == ["x"]


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_packed_files_read_as_their_content(ending: str, tmp_path: Path) -> None:
    plain = tmp_path / f"a{ending}"
    rows = [{"text": f"{n} " * 50} for n in range(100)]
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), plain)
    elif ending == ".arrow":
        with pa.ipc.new_file(plain, pa.schema([("text", pa.string())])) as file:
            file.write(pa.Table.from_pylist(rows))
    elif ending == ".csv":
        plain.write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
    elif ending == ".json":
        plain.write_text(json.dumps(rows))
    else:
        write_json_lines(plain, rows)
    raw = plain.read_bytes()
    half = len(raw) // 2
    two_members = gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    (tmp_path / f"a{ending}.gz").write_bytes(two_members)
    (tmp_path / f"a{ending}.zst").write_bytes(zstandard.compress(raw))
    expected = texts(plain)
    assert len(expected) == (1 if ending == ".txt" else 100)
    for packing in (".gz", ".zst"):
        assert texts(f"{plain}{packing}") == expected
        packed = Path(f"{plain}{packing}").read_bytes()
        Path(f"{plain}{packing}").write_bytes(packed[:-20])
        with pytest.raises(UserError, match=rf"a{ending}{packing}: .*Truncated compressed stream"):
            texts(f"{plain}{packing}")


def test_a_packed_file_at_a_signed_url(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(b'{"text": "ok"}')
    file = io.BufferedReader(io.BytesIO(packed))  # type: ignore[arg-type]
    monkeypatch.setattr(remote, "open_file", lambda *_: file)
    source = TextFile("a.jsonl.gz", "https://host/a.jsonl.gz?signature", len(packed))
    documents = Reader(SourceConfig(input=source.path), [source]).documents(Counter())
    assert ["".join(texts) for _, _, texts in documents] == ["ok"]


def test_parquet_kinds_of_text(tmp_path: Path) -> None:
    dictionary = pa.dictionary(pa.int32(), pa.string())
    for n, kind in enumerate([pa.large_string(), pa.string_view(), dictionary, pa.null()]):
        column = pa.array([None, None] if pa.types.is_null(kind) else ["a", None]).cast(kind)
        pq.write_table(pa.table({"text": column}), tmp_path / f"{n}.parquet")
        assert texts(tmp_path / f"{n}.parquet") == ([] if pa.types.is_null(kind) else ["a"])


def test_dictionaries_of_any_kind_of_value(tmp_path: Path) -> None:
    for n, values in enumerate(
        [pa.array(["a", "b", None], pa.string_view()), pa.array([["a"], ["b"], None])]
    ):
        column = pa.DictionaryArray.from_arrays(pa.array([1, None, 0, 2], pa.int32()), values)
        with pa.ipc.new_file(tmp_path / f"{n}.arrow", pa.schema([("text", column.type)])) as file:
            file.write(pa.table({"text": column}))
    assert read(tmp_path / "0.arrow") == [("0.arrow", 1, "b"), ("0.arrow", 3, "a")]
    assert texts(tmp_path / "1.arrow", template="{text}") == ["['b']", "['a']"]


def test_folders_and_globs_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.jsonl", ".hidden/x.txt", "notes.md", "c.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = json.dumps({"text": name}) if name.endswith("l") else name
        (tmp_path / name).write_bytes(
            gzip.compress(name.encode()) if name.endswith("gz") else content.encode()
        )
    rows = [
        ("a.jsonl", 1, "a.jsonl"),
        ("b/10.txt", 1, "b/10.txt"),
        ("b/2.txt", 1, "b/2.txt"),
        ("c.txt.gz", 1, "c.txt.gz"),
    ]
    assert read(tmp_path) == rows
    assert read(f"{tmp_path}/**/*.txt") == [row for row in rows if row[0].startswith("b/")]
    # A file that the user names is read as text, whatever its ending.
    assert read(f"{tmp_path}/*.md") == [("notes.md", 1, "notes.md")]
    (tmp_path / "odd[1].txt").write_text("x")
    assert texts(tmp_path / "odd[1].txt") == ["x"]


def test_stdlib_is_the_corpus_of_the_quickstart() -> None:
    found = find_files(DataConfig().as_source())
    assert [source.name for source in found] == sorted(source.name for source in found)
    names = {part for source in found for part in source.name.split("/")[:-1]}
    assert not names & {
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "ensurepip",
    }
    documents = read("stdlib")
    size = sum(len(text.encode()) for _, _, text in documents)
    assert 350 < len(documents) < 900 and 6e6 < size < 2e7
    if sys.version_info[:2] == (3, 11):
        assert 465 <= len(documents) <= 480


def test_a_million_empty_rows_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n" + "1,\n" * 10**5 + "2,word\n")
    skipped: Counter[str] = Counter()
    assert read(tmp_path / "a.csv", skipped) == [("a.csv", 10**5 + 1, "word")]
    assert skipped == {"empty documents": 10**5}


def hub_folder(tmp_path: Path) -> str:
    """load_dataset reads a folder the way it reads a hub dataset."""
    (tmp_path / "hub").mkdir()
    for n in range(2):
        rows = {"text": [f"{n} one", None, f"{n} two"], "id": [1, 2, 3]}
        pq.write_table(pa.table(rows), tmp_path / "hub" / f"train-{n}.parquet")
    return str(tmp_path / "hub")


def test_hub_datasets_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    real = datasets.load_dataset
    folder = hub_folder(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **kwargs: real(folder, **kwargs))
    monkeypatch.chdir(tmp_path)
    rows = [(1, "0 one"), (3, "0 two"), (4, "1 one"), (6, "1 two")]
    assert read("someone/words") == [("someone/words", row, text) for row, text in rows]
    with pytest.raises(
        UserError,
        match=r"^someone/words: row 1: no data.text_column='texts' among its columns text, id",
    ):
        read("someone/words", text_column="texts")


def test_an_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(path: str, **_: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{path}'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=r"^someone/words: no such file here, and no hub dataset to be had: "
        r"Couldn't reach 'someone/words' on the Hub; a folder of token shards is made by"
        r" python -m dist_lm\.prepare$",
    ):
        read("someone/words")


TOO_LONG = "row 2: longer than 32 MB; nearest: a .txt file, which is read piece by piece"


def bad_files(folder: Path) -> dict[str, str]:
    """Writes the files; by name, what the error about each must say."""
    return bad_lines(folder) | bad_bytes(folder) | long_rows(folder) | bad_tables(folder)


def bad_lines(folder: Path) -> dict[str, str]:
    by_lines = {
        "surrogate.jsonl": (
            ['{"text": "ok"}', '{"text": "a\\ud800b"}'],
            "row 2: .*surrogates not allowed",
        ),
        "cut.jsonl": (['{"text": "ok"}', '{"text": "cu'], "row 2: Invalid control character at"),
        "number.jsonl": (
            ['{"text": "ok"}', "", '{"text": 5}'],
            "row 2: data.text_column='text' holds int, not text",
        ),
        "list.jsonl": (
            ["[1]", "5"],
            "row 1: must be an object with data.text_column='text', not int",
        ),
        "missing.jsonl": (
            ['{"txt": "a", "id": 1}'],
            "row 1: no data.text_column='text' among its columns txt, id; did you mean txt?",
        ),
        "deep.jsonl": (['{"text": ' + "[" * 10**5], "row 1: "),
        "array.json": (['[{"text": "a"}, {"text": "b" ,}]'], "row 2: "),
        "endless.json": (
            ['[{"text": "a"}, {"text": "b"}'],
            "row 3: the file ends inside the array",
        ),
        "open.json": (['[{"text": "a"}, {"text": "b'], "row 2: the file ends inside the array"),
        "missing.csv": (["id,body", "1,a"], "no data.text_column='text' among its columns"),
        "quote.csv": (["text", "a", '"b'], "row 2: unexpected end of data"),
        "notparquet.parquet": (["hello"], "Parquet"),
    }
    for name, (content, _) in by_lines.items():
        (folder / name).write_text("\n".join(content) + "\n")
    return {name: message for name, (_, message) in by_lines.items()}


def bad_bytes(folder: Path) -> dict[str, str]:
    (folder / "bytes.txt").write_bytes(b"a" * 70 + b"\xff" + b"b" * 70)
    (folder / "separated.txt").write_bytes(b"one#two#three\xc3")
    (folder / "bytes.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xed\xa0\x80"}\n')
    (folder / "bytes.csv").write_bytes(b"text\nok\nok\n\xff\n")
    (folder / "bytes.json").write_bytes(b'[{"text": "ok"}, {"text": "\xff"}]')
    ends = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0")
    bad = pa.StringArray.from_buffers(2, ends, pa.py_buffer(b"ok\xff\xff"))
    pq.write_table(pa.table({"text": bad}), folder / "bytes.parquet")
    return {
        "bytes.txt": "row 1: byte 70 of the text, 0xff, is not UTF-8",
        "separated.txt": "row 3: byte 13 of the text, 0xc3, is not UTF-8",
        "bytes.jsonl": "row 2: 'utf-8' codec can't decode byte 0xed in position 10",
        "bytes.csv": "row 3: 'utf-8' codec can't decode byte 0xff",
        "bytes.json": "row 2: 'utf-8' codec can't decode byte 0xff in position 10",
        "bytes.parquet": "row 2: 'utf-8' codec can't decode byte 0xff in position 0",
    }


def long_rows(folder: Path) -> dict[str, str]:
    """Rows of more than 2000 bytes."""
    (folder / "long.jsonl").write_text('{"text": "ok"}\n{"text": "' + "x" * 3000 + '"}\n')
    (folder / "long.json").write_text('[{"text": "ok"}, {"text": "' + "x" * 3000 + '"}]')
    (folder / "long.csv").write_text('text\nok\n"' + "x\n" * 1500 + '"\n')
    (folder / "line.csv").write_text("text\nok\n" + "x" * 3000 + "\n")
    pq.write_table(pa.table({"text": ["ok", "x" * 3000, *["ok"] * 9]}), folder / "long.parquet")
    longer = pa.table({"a": [{"b": 1, "c": 2}] * 2, "text": ["x" * 5000, "ok"]})
    pq.write_table(longer, folder / "longer.parquet", compression="none")
    return {
        "long.jsonl": TOO_LONG,
        "long.json": TOO_LONG,
        "line.csv": TOO_LONG,
        "long.csv": r"row 2: field larger than field limit \(2000\)",
        "long.parquet": TOO_LONG,
        "longer.parquet": "row group 1: its rows are longer than 32 MB; nearest: a .txt file",
    }


def bad_tables(folder: Path) -> dict[str, str]:
    pq.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    pq.write_table(pa.table({"test": ["a"]}), folder / "missing.parquet")
    of_lists = pa.table({"nested": [{"a": 1, "b": [2]}], "text": [["list"]]})
    pq.write_table(of_lists, folder / "list.parquet")
    return {
        "numbers.parquet": "data.text_column='text' holds int64, not text",
        "list.parquet": "data.text_column='text' holds list<.*string>, not text",
        "missing.parquet": "no data.text_column='text' among its columns test; did you mean test?",
    }


def test_bad_input_is_refused_by_file_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LONGEST_ROW", 2000)
    monkeypatch.setattr(lines, "CHUNK", 64)
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(UserError, match=f"^{tmp_path}/{name}: .*{message}") as raised:
            texts(tmp_path / name, separator="#")
        assert raised.value.code == 65 and "\n" not in str(raised.value), name


# Values that are no row of text, but end where a value should.
BAD_VALUES = {
    "escape": rb'{"text": "a\q, ]"}',
    "escape cut short": rb'{"text": "\u12"}',
    "lone surrogate": rb'{"text": "\ud800"}',
    "digits": b'{"text": "a", "id": ' + b"1" * 5000 + b"}",
    "deep lists": b'{"text": ' + b"[" * 1500 + b"]" * 1500 + b"}",
    "deep objects": b'{"text": ' + b'{"a":' * 1200 + b"1" + b"}" * 1200 + b"}",
    "bad byte": b'{"text": "\xff"}',
    "bad byte elsewhere": b'{"text": "a", "id": "\xff"}',
    "control character": b'{"text": "a\x01b"}',
    "comma too many": b'{"text": "a",}',
    "no colon": b'{"text" "a"}',
    "no quotes": b"{text: a}",
    "number for text": b'{"text": 5}',
    "no text": b'{"id": 5}',
    "no number": b'{"text": "a", "id": 1x}',
    "too long": b'{"text": "' + b"x\\\\" * 2700 + b'"}',
    "too long a list": b"[" + b'{"text": "a"}, ' * 600 + b"1]",
    "number": b"-12.5e3",
    "many digits": b"1" * 5000,
    "word": b"nul",
    "sign": b"-",
    "string": b'"a, [{"',
    "list": b'[1, [{"text": "a"}]]',
    "letters": b"abc def",
    "quoted mark": b'x"]," y',
}


def as_array(values: list[bytes], path: Path, gap: bytes = b", ") -> Path:
    path.write_bytes(b"[" + gap.join(values) + b"]")
    return path


def read_skipping(path: Path, start: int = 0) -> tuple[list[tuple[int, str]], Counter[str]]:
    """Rows with their texts, and what was left out."""
    source = SourceConfig(input=str(path))
    skipped: Counter[str] = Counter()
    documents = Reader(source, find_files(source), bad_rows="skip").documents(skipped, start=start)
    return [(row, "".join(texts)) for _, row, texts in documents], skipped


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_of_an_array_costs_no_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LONGEST_ROW", 8000)
    rows = [b'{"text": "row %d"}' % n for n in range(1, 101)]
    rows[10] = BAD_VALUES[name]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    expected = [(n, f"row {n}") for n in range(1, 101) if n != 11]
    for path in (as_array(rows, tmp_path / "a.json"), tmp_path / "a.jsonl"):
        assert read_skipping(path) == (expected, {"bad rows": 1})
        with pytest.raises(UserError, match=rf"^{path}: row 11: [^\n]+$") as raised:
            texts(path)
        assert raised.value.code == 65
    assert read_skipping(tmp_path / "a.json", start=50) == (expected[48:], {})


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(
        st.one_of(TEXT.filter(str.strip), st.sampled_from(sorted(BAD_VALUES.values()))), max_size=8
    ),
    is_ascii=st.booleans(),
    gap=st.sampled_from([b",", b", ", b"\n,\r\n\t"]),
    chunk=st.sampled_from([1, 2, 7, 64, 2**20]),
)
def test_documents_and_bad_rows_of_an_array_are_its_rows(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[str | bytes],
    is_ascii: bool,
    gap: bytes,
    chunk: int,
) -> None:
    rows, expected = [], []
    for row, value in enumerate(values, 1):
        if isinstance(value, str):
            expected.append((row, value))
            value = json.dumps(
                {"id": [{}, "]", row], "text": value}, ensure_ascii=is_ascii
            ).encode()
        rows.append(value)
    path = as_array(rows, tmp_path_factory.getbasetemp() / "damaged.json", gap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK", chunk)
        patch.setattr(lines, "LONGEST_ROW", 8000)
        documents, skipped = read_skipping(path)
    assert documents == expected
    assert skipped == ({"bad rows": len(rows) - len(expected)} if len(rows) > len(expected) else {})


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".txt"])
def test_a_packed_file_that_is_cut_short_gives_all_that_it_holds(
    ending: str, packing: str, tmp_path: Path
) -> None:
    """Not only what was unpacked before the read in which its end was missed."""
    rng = random.Random(1)
    rows = [" ".join(rng.choices(WORDS, k=40)) for _ in range(4000)]
    if ending == ".jsonl":
        rows = [json.dumps({"text": row}) for row in rows]
    head = "text\n" if ending == ".csv" else ""
    content = (head + "\n".join(rows) + "\n").encode()
    compress = gzip.compress if packing == ".gz" else zstandard.compress
    packed = compress(content)[: -len(compress(content)) // 7]
    (tmp_path / f"a{ending}{packing}").write_bytes(packed)
    unpack = zlib.decompressobj(31) if packing == ".gz" else zstandard.ZstdDecompressor()
    if packing == ".zst":
        unpack = unpack.decompressobj()
    held = unpack.decompress(packed).count(b"\n") - len(head) // 5
    assert 2000 < held < 4000
    source = SourceConfig(
        input=str(tmp_path / f"a{ending}{packing}"),
        separator="\n" if ending == ".txt" else None,
    )
    skipped: Counter[str] = Counter()
    reader = Reader(source, find_files(source), bad_rows="skip")
    read = sum(1 for _, _, texts in reader.documents(skipped) if "".join(texts))
    # Of a .txt, the beginning of the document that is cut off is a document too.
    assert held <= read <= held + (ending == ".txt")
    assert skipped == {"rests of damaged files": 1}


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_an_array_that_is_cut_off_loses_its_rest(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "CHUNK", chunk)
    monkeypatch.setattr(lines, "LONGEST_ROW", 100)
    path = tmp_path / "a.json"
    for content, documents, skipped in [
        (b'[{"text": "a"}, {"text": "b', [(1, "a")], {}),
        (b'[{"text": "a"}, {"text": "b"}', [(1, "a"), (2, "b")], {}),
        (b'[{"text": "a"}, {"text": "b"},', [(1, "a"), (2, "b")], {}),
        (b'[{"text": "a"}, 12', [(1, "a")], {}),
        (b'[{"text": "a"}, {"text": "b, {"text": "c"}, {"text": "d"}]', [(1, "a")], {}),
        (b'[{"text": "a"}, {"text": ["b"}, {"text": "c"}]', [(1, "a")], {"bad rows": 1}),
        (b'[{"text": "a"}, {"text": "' + b"x" * 1000, [(1, "a")], {"bad rows": 1}),
        (b"[", [], {}),
    ]:
        path.write_bytes(content)
        assert read_skipping(path) == (documents, skipped | {"rests of damaged files": 1}), content


def test_a_value_too_long_is_passed_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_ROW", 2**20)
    taken = 0

    def chunks() -> Iterator[str]:
        nonlocal taken
        yield '[{"text": "'
        for _ in range(1000):
            taken += 1
            yield 'x\\"' * 2**14
        yield '"}, {"text": "ok"}]'

    values = JsonArray(chunks())
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="^longer than"):
            next(values)
        # It is refused as soon as it is known to be too long.
        assert taken * 3 * 2**14 < 2**20 + 2**17
        assert list(values) == [{"text": "ok"}]
        assert taken == 1000 and tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["bytes.jsonl", "bytes.csv", "bytes.parquet"])
@pytest.mark.parametrize("template", [None, "{text}"])
def test_rows_behind_a_bad_one_are_read(name: str, template: str | None, tmp_path: Path) -> None:
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n{"text": "yo"}\n')
    (tmp_path / "bytes.csv").write_bytes(b"text\nok\n\xff\nyo\n")
    column = pa.StringArray.from_buffers(
        3,
        pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0])),
        pa.py_buffer(b"ok\xffyo"),
    )
    pq.write_table(pa.table({"text": column}), tmp_path / "bytes.parquet")
    source = SourceConfig(input=str(tmp_path / name), template=template)
    skipped: Counter[str] = Counter()
    reader = Reader(source, find_files(source), bad_rows="skip")
    documents = [(row, "".join(texts)) for _, row, texts in reader.documents(skipped)]
    assert documents == [(1, "ok"), (3, "yo")]
    assert skipped == {"bad rows": 1}
    # What lies before the start is not counted again.
    assert [row for _, row, _ in reader.documents(skipped, start=3)] == [3]
    assert skipped == {"bad rows": 1}


def test_a_bad_csv_row_of_several_lines_is_one_bad_row(tmp_path: Path) -> None:
    bad = b'text,id\n"bad \xff line\nends with a newline\n",2\n'
    good = b'"good one",3\n"good two",4\ngood three,5\n'
    (tmp_path / "a.csv").write_bytes(bad + good)
    source = SourceConfig(input=str(tmp_path / "a.csv"))
    skipped: Counter[str] = Counter()
    found = find_files(source)
    documents = Reader(source, found, bad_rows="skip").documents(skipped)
    assert [(row, "".join(texts)) for _, row, texts in documents] == [
        (2, "good one"),
        (3, "good two"),
        (4, "good three"),
    ]
    assert skipped == {"bad rows": 1}
    with pytest.raises(
        UserError, match=r"a\.csv: row 1: 'utf-8' codec can't decode byte 0xff in position 4"
    ):
        list(Reader(source, found).documents(Counter()))


def test_what_is_left_out_is_counted_by_its_kind(tmp_path: Path) -> None:
    """Rows of .csv that end before their text are no nulls, and a text that was cut is no text."""
    rows = ["id,text", "1,good", "2", "3,", "4,a text, with a comma", "5,also good,,"]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    texts_read, skipped = read_skipping(tmp_path / "a.csv")
    assert texts_read == [(1, "good"), (5, "also good")]
    assert skipped == {"short rows": 1, "empty documents": 1, "bad rows": 1}
    with pytest.raises(UserError, match=r"a.csv: row 4: 3 cells under 2 columns; a text with a co"):
        texts(tmp_path / "a.csv")


def test_rows_that_do_not_fit_a_template_are_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud800", "b": 1}\n{"a": "ok", "b": 2}\n')
    (tmp_path / "a.csv").write_text("a,b\nfew\nok,2\n")
    for name, message in {
        "a.jsonl": "surrogates not allowed",
        "a.csv": "no column 'b' of data.template in it",
    }.items():
        source = SourceConfig(input=str(tmp_path / name), template="{a} {b}")
        skipped: Counter[str] = Counter()
        found = find_files(source)
        documents = Reader(source, found, bad_rows="skip").documents(skipped)
        assert [(row, "".join(texts)) for _, row, texts in documents] == [(2, "ok 2")]
        assert skipped == {"bad rows": 1}
        with pytest.raises(UserError, match=rf"{name}: row 1: .*{message}"):
            list(Reader(source, found).documents(Counter()))


@pytest.mark.parametrize("template", ["{a:>5}", "{a:d}", "{a.upper}", "{a[9]}", "{a!r:.3d}"])
def test_a_value_that_does_not_fit_a_layout_is_a_bad_row(template: str, tmp_path: Path) -> None:
    name = template.strip("{}").partition(":")[0].partition("!")[0]
    (tmp_path / "a.jsonl").write_text(json.dumps({name: ["x"]}) + "\n")
    source = SourceConfig(input=str(tmp_path / "a.jsonl"), template=template)
    with pytest.raises(UserError, match=r"a\.jsonl: row 1: "):
        list(Reader(source, find_files(source)).documents(Counter()))


def test_a_missing_column_is_said_with_its_setting(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": 1, "id": 2}])
    for fields, message in [
        ({"text_column": "body"}, "no data.sources.web.text_column='body' among its columns"),
        ({}, "data.sources.web.text_column='text' holds int, not text"),
        (
            {"template": "{texts}"},
            "no column 'texts' of data.sources.web.template among its columns text, id",
        ),
        (
            {"filter": {"lang": "en"}},
            "no column 'lang' of data.sources.web.filter among its columns",
        ),
    ]:
        source = SourceConfig.model_validate({"input": str(path), **fields})
        reader = Reader(source, find_files(source), label="data.sources.web.input")
        with pytest.raises(UserError, match=f"row 1: {message}"):
            list(reader.documents(Counter()))


def test_missing_input_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shakespeare.txt").write_text("To be")
    Path("empty").mkdir()
    for name, message in {
        "shakespear.txt": r"'shakespear.txt': no such file; did you mean shakespeare.txt\?"
        r" \(a hub dataset is owner/name\)",
        "empty/shakespeare": r"'empty/shakespeare': no such file \(a hub dataset is owner/name\)",
        "no/such/file.txt": r"'no/such/file.txt': no such file \(a hub dataset is owner/name\)",
        "*.csv": "'\\*.csv': no file matches",
        "empty": r"'empty': the folder has none of .txt .jsonl .json .csv .parquet .arrow"
        r" \(or .gz, .zst\)",
    }.items():
        with pytest.raises(UserError, match=f"^data.input={message}$") as raised:
            find_files(SourceConfig(input=name))
        assert raised.value.code == 65
    for name in ("no/such/file.txt", "memory://no/such/file.txt"):
        with pytest.raises(UserError, match=f"^data.sources.web.input='{name}': no"):
            find_files(SourceConfig(input=name), "data.sources.web.input")


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    source = SourceConfig(input=str(tmp_path))
    found = find_files(source)
    os.remove(tmp_path / "a.txt")
    with pytest.raises(UserError, match=f"^{tmp_path}/a.txt: .*No such file"):
        list(Reader(source, found).documents(Counter()))


def test_an_outage_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    class EndpointError(Exception):
        """No OSError, as botocore's are."""

    def fail(reader: Any, count: int) -> bytes:
        raise EndpointError("could not connect")

    fsspec.filesystem("memory").pipe("/outage/a.jsonl", b'{"text": "ok"}\n')
    source = SourceConfig(input="memory://outage/a.jsonl")
    found = find_files(source)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    monkeypatch.setattr(remote.RemoteReader, "_fetch", fail)
    with pytest.raises(
        UserError, match=r"a\.jsonl: .*given up after \d+ tries .*could not connect"
    ):
        list(Reader(source, found, bad_rows="skip").documents(Counter()))
