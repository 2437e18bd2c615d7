"""Training from streams in real processes: one run in every world, cut anywhere; refusals."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from dist_lm import history, show
from dist_lm.checkpoint.folder import step_folders
from dist_lm.config import Config, batch_layout
from dist_lm.data.batches import Batches
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.data.lane import StreamSpec
from dist_lm.data.mix import count_left_out
from dist_lm.data.prepared.holdout import document_hash, held_out
from dist_lm.data.sources import PreparedSource, StreamSource
from dist_lm.data.stream import Stream
from dist_lm.errors import UserError
from dist_lm.metrics import read_metrics
from tests.conftest import text_of
from tests.objectstore import ObjectStore
from tests.procs import clean_env, finish, start_ranks, train
from tests.runtime.test_zero import spread
from tests.test_train import assert_same_bits, assert_same_curve, losses, tiny, wait_for_step

CPU = torch.device("cpu")
STREAM = ("--data.tokenizer", "byte", "--data.lanes", "4", "--run.eval_batches", "2")


def documents(count: int, seed: int) -> list[str]:
    return [f"{seed} {text}" for text in text_of(count, seed).split("\n\n")]


def write_rows(path: Path, texts: list[Any], rows: int = 20) -> Path:
    """Parquet, or .jsonl, or that packed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=rows)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Parquet, and rows in .jsonl."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(2):
        write_rows(folder / "parquet" / f"{number}.parquet", documents(150, number))
    write_rows(folder / "rows.jsonl", documents(300, 7))
    return folder


def mixed(folder: Path, corpus: Path, *more: str) -> list[str]:
    """Flags of a run over two sources."""
    sources = {
        "web": {"input": str(corpus / "parquet"), "weight": 0.7},
        "rows": {"input": str(corpus / "rows.jsonl"), "weight": 0.3},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mix.yaml").write_text(yaml.safe_dump({"data": {"stream": True, "sources": sources}}))
    return ["--config", str(folder / "mix.yaml"), *tiny(Path("unused"), *STREAM, *more)[2:]]


def single(path: Any, *more: str) -> list[str]:
    return [
        "--data.input",
        str(path),
        *tiny(Path("unused"), "--data.stream", "true", *STREAM, *more)[2:],
    ]


def two_passes(path: Any, *more: str) -> list[str]:
    flags = single(
        path, "--run.epochs", "2", "--optim.schedule", "constant", "--run.eval_every", "0", *more
    )
    at = flags.index("--run.steps")
    return flags[:at] + flags[at + 2 :]


def opened(folder: Path, path: Any, **data: Any) -> tuple[Config, Dataset]:
    fields = {
        "input": str(path),
        "stream": True,
        "tokenizer": "byte",
        "seq_len": 16,
        "global_batch": 4,
        "workers": 0,
    }
    run = {"dir": str(folder), "eval_batches": 2} | data.pop("run", {})
    config = Config.model_validate({"data": fields | data, "run": run}, strict=False)
    return config, open_dataset(config, lambda work: work(), say=print)


def stream_spec(data: Dataset) -> StreamSpec:
    (source,) = data.sources.values()
    assert isinstance(source, StreamSource)
    return source.spec


def read_through(data: Dataset, passes: int = 1) -> list[str]:
    """The documents of one pass, by the text of their sequences."""
    spec = stream_spec(data)
    spec.passes = passes
    inputs: list[int] = []
    for _, sequence in Stream(spec).deal(10**6):
        assert sequence
        inputs += sequence.tokens[:16].tolist()
    return data.tokenizer.decode(inputs, skip_special=False).split("<|endoftext|>")


def test_what_a_validation_set_leaves_out_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_rows(tmp_path / "a.jsonl", documents(100, 3))
    held = write_rows(tmp_path / "held.jsonl", [None, *documents(30, 4), " "])
    opened(tmp_path / "run", text, validation={"held": {"input": str(held)}})
    assert "held: skipped: 1 null row" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run/data/val/held/dataset.json").read_text())
    assert manifest["skipped"] == {"null rows": 1}


@pytest.mark.slow
def test_what_a_stream_left_out_is_printed_once(tmp_path: Path) -> None:
    """At the end of each start, of the whole run so far."""
    text = write_rows(tmp_path / "a.jsonl", [None, "", *documents(60, 3)])
    flags = single(text, "--data.lanes", "1", "--run.save_every", "2", "--run.eval_every", "0")
    told = "left out so far: 1 empty document, 1 null row"
    for stop in ("6", "8"):
        output = train(tmp_path / "run", *flags, "--run.stop_after", stop)
        assert output.count("left out") == output.count(told) == 1


# --- one run


@pytest.mark.slow
def test_a_chain_of_strategies_over_two_streams(corpus: Path, tmp_path: Path) -> None:
    """A run that changes strategy and world has the batches and losses of the undisturbed one."""
    flags = mixed(tmp_path, corpus, "--run.steps", "20", "--model.dropout", "0.1")
    train(tmp_path / "whole", *flags)
    for strategy, world, stop in (
        ("ddp", 2, 5),
        ("zero2", 4, 10),
        ("zero3", 3, 15),
        ("single", 1, 20),
    ):
        spread(tmp_path / "chain", strategy, world, *flags, "--run.stop_after", str(stop))
    assert_same_curve(tmp_path / "chain", tmp_path / "whole", 1e-5)
    last = losses(tmp_path / "chain")[-1]
    assert (round(last["share_web"], 9), round(last["share_rows"], 9)) == (0.7, 0.3)


@pytest.mark.slow
def test_whole_passes_end_the_run_wherever_it_is_killed(corpus: Path, tmp_path: Path) -> None:
    flags = two_passes(
        corpus / "parquet",
        "--run.save_every",
        "5",
        "--data.lanes",
        "3",
        "--data.global_batch",
        "64",
    )
    train(tmp_path / "whole", *flags, world=2)
    ranks = start_ranks(2, "dist_lm/train.py", "--run.dir", str(tmp_path / "killed"), *flags)
    wait_for_step(tmp_path / "killed", 12, ranks)
    for rank in ranks:
        rank.kill()
        rank.communicate()
    train(tmp_path / "killed", *flags, world=2)
    assert_same_bits(*(step_folders(tmp_path / name)[-1] for name in ("killed", "whole")))
    train(tmp_path / "other", *flags, "--run.stop_after", "7", world=3)
    train(tmp_path / "other", *flags, "--data.workers", "0")
    assert_same_curve(tmp_path / "other", tmp_path / "whole", 1e-5)
    texts = [*documents(150, 0), *documents(150, 1)]
    tokens = 2 * sum(len(text.encode()) + 1 for text in texts if not is_held_out(text))
    # The first token of each of the three lanes has no predecessor.
    assert losses(tmp_path / "whole")[-1]["tokens"] == tokens - 3


def is_held_out(text: str) -> bool:
    return held_out(document_hash(iter([text]))[0], 0.1)


@pytest.mark.slow
def test_a_killed_object_store_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "parquet", tmp_path / "store/bucket/parquet")
    store = ObjectStore(tmp_path / "store")
    flags = two_passes("s3://bucket/parquet")
    env = {**store.env, "AWS_MAX_ATTEMPTS": "1"}
    try:
        store.start()
        train(tmp_path / "whole", *flags, **env)
        ranks = start_ranks(
            1, "dist_lm/train.py", "--run.dir", str(tmp_path / "cut"), *flags, **env
        )
        wait_for_step(tmp_path / "cut", 5, ranks)
        store.kill()
        assert ranks[0].stdout
        assert any("trying again for" in line for line in ranks[0].stdout), (
            "no read met a dead server"
        )
        store.start()
        code, output = finish(ranks)
        assert code == 0, output
    finally:
        store.kill()
    assert_same_curve(tmp_path / "cut", tmp_path / "whole", 0.0)


@pytest.mark.slow
def test_packing_by_best_fit_with_document_masks(corpus: Path, tmp_path: Path) -> None:
    flags = single(
        corpus / "rows.jsonl", "--data.packing", "best_fit", "--data.document_mask", "true"
    )
    train(tmp_path / "one", *flags)
    train(tmp_path / "three", *flags, world=3)
    assert_same_curve(tmp_path / "three", tmp_path / "one", 1e-5)


# --- what is trained on, and what is not


def test_validation_is_never_trained_on(corpus: Path, tmp_path: Path) -> None:
    """Documents of a named validation source that are in the stream as well are left out there."""
    own = documents(150, 0)
    shared = [text for text in own if not is_held_out(text)][:5]
    write_rows(tmp_path / "asked.jsonl", [*shared, "only here " * 40])
    asked = {"asked": {"input": str(tmp_path / "asked.jsonl")}}
    _, data = opened(
        tmp_path / "run", corpus / "parquet", validation=asked, lanes=1, run={"eval_batches": 20}
    )
    trained = read_through(data)[:-1]
    assert set(data.val) == {"asked", "val"}
    assert not set(trained) & set(shared) and not any(map(is_held_out, trained))
    both = [*documents(150, 0), *documents(150, 1)]
    assert set(trained) == {text for text in both if not is_held_out(text)} - set(shared)
    kept = data.val["val"].read(range(8), 16, 16)[:, :16]
    text = data.tokenizer.decode(kept.reshape(-1).tolist(), skip_special=False)
    first = [text for text in both if is_held_out(text)]
    assert "<|endoftext|>".join(first).startswith(text[:-1])  # in source order, the first ones


def test_a_stream_without_validation_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [f"{n} words" for n in range(3000)])
    with pytest.raises(
        UserError,
        match=r"data.val_fraction=1e-09 holds out none of the first 1000 documents of .*a.jsonl;"
        r" rule: a stream's first .*; nearest: prepare it, a larger data.val_fraction, a source in",
    ):
        opened(tmp_path / "run", path, val_fraction=1e-9)
    opened(tmp_path / "run", path, val_fraction=1e-9, run={"eval_every": 0})


def test_a_changed_file_is_named(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "parquet", tmp_path / "text")
    opened(tmp_path / "run", tmp_path / "text")
    opened(tmp_path / "run", tmp_path / "text")
    os.utime(tmp_path / "text/1.parquet", (1, 1))
    with pytest.raises(
        UserError, match=r"text/1.parquet of text changed or vanished since the run began"
    ):
        opened(tmp_path / "run", tmp_path / "text")
    (tmp_path / "text/1.parquet").unlink()
    with pytest.raises(
        UserError, match=r"text/1.parquet of text changed or vanished since the run began"
    ):
        opened(tmp_path / "run", tmp_path / "text")
    shutil.copy2(corpus / "parquet/1.parquet", tmp_path / "text/1.parquet")
    shutil.copy2(corpus / "parquet/1.parquet", tmp_path / "text/2.parquet")
    with pytest.raises(UserError, match=r"2.parquet of text was not there when the run began"):
        shutil.rmtree(tmp_path / "run/data")
        (tmp_path / "text/2.parquet").rename(tmp_path / "2.parquet")
        opened(tmp_path / "run", tmp_path / "text")
        (tmp_path / "2.parquet").rename(tmp_path / "text/2.parquet")
        opened(tmp_path / "run", tmp_path / "text")


@pytest.mark.parametrize("kind", ["rows.jsonl", "cut.parquet", "cut.jsonl.gz", "bytes.txt"])
def test_bad_rows_are_refused_or_counted(tmp_path: Path, kind: str) -> None:
    texts = documents(200, 3)
    path = tmp_path / "text" / kind
    if kind == "rows.jsonl":
        write_rows(path, texts)
        path.write_bytes(
            path.read_bytes()
            + b'{"text": 5}\n{"text": "\xff"}\n{"text": null}\n'
            + b'{"text": "good"}\n'
        )
    elif kind == "bytes.txt":
        write_rows(path.with_name("good.jsonl"), texts)
        path.write_bytes(b"one " * 10 + b"\xff")
    else:
        write_rows(path.with_name("good.jsonl"), texts)
        write_rows(path, documents(200, 4), 200)
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2] if kind.endswith("gz") else raw[:-7] + b"garbage")
    options = {"val_fraction": 0.05, "run": {"eval_every": 0}}
    with pytest.raises(UserError, match=rf"text/{kind}: ") as refusal:
        read_through(opened(tmp_path / "a", tmp_path / "text", **options)[1])
    assert refusal.value.code == 65
    _, data = opened(tmp_path / "b", tmp_path / "text", bad_rows="skip", lanes=1, **options)
    expected = {"rests of damaged files": 1}
    if kind == "rows.jsonl":
        expected = {"bad rows": 2, "null rows": 1}
    spec = stream_spec(data)
    stream = Stream(spec)
    spec.passes = 1
    for count in (1, 10**6):  # inside the only block, and at its end
        assert stream.deal(count)
        state = json.loads(json.dumps(stream.snapshot()))
        # A run says this at a checkpoint, and counts on from there if it resumes.
        assert count_left_out({"streams": {"text": state}}) == expected
        stream = Stream(spec, state)


def test_templates_and_filters(tmp_path: Path) -> None:
    rows = [{"title": f"t{n}", "body": f"b{n}", "lang": "en" if n % 3 else "de"} for n in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.Table.from_pylist(rows).schema) as file:
        file.write(pa.Table.from_pylist(rows))
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        source = {
            "input": str(tmp_path / name),
            "template": "{title}: {body}",
            "filter": {"lang": "en"},
        }
        _, data = opened(
            tmp_path / name[2:],
            "stdlib",
            sources={"s": source},
            lanes=1,
            val_fraction=0.0,
            run={"eval_every": 0},
        )
        assert sorted(read_through(data)[:-1])[:3] == ["t10: b10", "t11: b11", "t13: b13"], name


def test_a_prepared_folder_at_a_url_is_the_local_one(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_LM_CACHE", str(tmp_path / "cache"))
    _, here = opened(tmp_path / "run", prepared, stream=False)
    config, there = opened(tmp_path / "run", f"file://{prepared}", stream=False)
    assert there.identity == here.identity and there.val["val"].sizes == here.val["val"].sizes
    some = np.arange(0, there.train.count(config.data), 7)
    assert np.array_equal(there.train.read(some, 16, 16), here.train.read(some, 16, 16))
    (copy,) = (tmp_path / "cache").glob("*.safetensors")
    assert copy.name.endswith("-train-00000.safetensors")


@pytest.mark.slow
def test_a_hub_dataset_streams_by_row_group(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """load_dataset reads a folder as it reads a hub dataset; here no hub is reached."""
    import datasets  # slow

    asked = []
    real = datasets.load_dataset

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append((path, options["name"], options["split"], options["revision"]))
        return real(str(corpus / "parquet"), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"input": "someone/words", "subset": "small", "split": "test", "revision": "v2"}
    _, data = opened(
        tmp_path / "hub",
        "stdlib",
        sources={"s": source},
        val_fraction=0.0,
        lanes=1,
        run={"eval_every": 0},
    )
    assert len(stream_spec(data).parts) == 2 * 8  # 150 rows in groups of 20
    both = [*documents(150, 0), *documents(150, 1)]
    assert sorted(read_through(data)[:-1]) == sorted(both)
    assert set(asked) == {("someone/words", "small", "test", "v2")}


def test_validation_is_left_out_of_what_is_prepared(corpus: Path, tmp_path: Path) -> None:
    shared = documents(300, 7)[:40]
    write_rows(tmp_path / "asked.jsonl", shared)
    named = {
        "rows": {"input": str(corpus / "rows.jsonl")},
        "web": {"input": str(corpus / "parquet")},
    }
    _, data = opened(
        tmp_path / "run",
        "stdlib",
        stream=False,
        sources=named,
        run={"eval_batches": 400},
        validation={"asked": {"input": str(tmp_path / "asked.jsonl")}},
    )
    rows = data.sources["rows"]
    assert isinstance(rows, PreparedSource)
    tokens = rows.read(np.arange(rows.sequences))[:, :16].reshape(-1)
    trained = set(data.tokenizer.decode(tokens, skip_special=False).split("<|endoftext|>"))
    assert not trained & set(shared)
    assert len(trained & set(documents(300, 7))) >= 260 - sum(map(is_held_out, documents(300, 7)))


def test_one_long_document_among_fewer_than_lanes(tmp_path: Path) -> None:
    write_rows(tmp_path / "text/a.jsonl", ["short", "row"])
    (tmp_path / "text/long.txt").write_text("word " * 10**5)
    _, data = opened(
        tmp_path / "run",
        tmp_path / "text",
        seq_len=1000,
        lanes=8,
        val_fraction=0.0,
        run={"eval_every": 0},
    )
    assert stream_spec(data).lanes == 2
    stream_spec(data).passes = 1
    targets = 0
    for _, sequence in Stream(stream_spec(data)).deal(10**6):
        assert sequence
        targets += len(sequence.tokens) - 1
    assert targets == 5 * 10**5 + len("short") + len("row") + 3 - 2


def test_an_empty_source(tmp_path: Path) -> None:
    write_rows(tmp_path / "text/a.jsonl", [])
    with pytest.raises(UserError, match="text: no document to train on; rule: at least one"):
        read_through(opened(tmp_path / "run", tmp_path / "text", run={"eval_every": 0})[1])


# --- provenance


def test_find_names_rows_as_show_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the bytes at which the lines of a .jsonl begin, by which a stream remembers them."""
    texts = documents(40, 3)
    texts[26] = "the needle"
    rows = write_rows(tmp_path / "text/a.jsonl", texts)
    config, data = opened(tmp_path / "run", rows, run={"eval_every": 0}, val_fraction=0)
    step = 0
    rows_seen: set[int] = set()
    for origins in history.read_steps(config, data, 0):
        step += 1
        for origin in origins.values():
            rows_seen.update(span.row for span in origin.documents())
        if 27 in rows_seen:
            break
    figures = {"step": step, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens": 1}
    figures |= {"tokens_per_second": 1.0, "data_wait": 0.0}
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(figures) + "\n")
    history.find(config, data, "the needle")
    assert f"step {step}: a.jsonl row 27\n" in capsys.readouterr().out


@pytest.mark.slow
def test_show_and_find_read_a_stream_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = mixed(
        tmp_path, corpus, "--run.save_every", "4", "--run.steps", "9", "--run.eval_every", "9"
    )
    train(tmp_path / "run", *flags)
    config, data = show_config(tmp_path / "run")
    reader, layout = data.open_reader(config.data), batch_layout(config, 1)
    batches = Batches(reader, config.data, layout, CPU, eot=data.tokenizer.eot)
    rows = [batches.read(step).micros[0] for step in range(7)][-1]
    capsys.readouterr()
    show.main([str(tmp_path / "run"), "--step", "7", "--world", "2", "--rank", "1"])
    printed = capsys.readouterr().out
    assert printed.startswith("step 7: 8 sequences of 32 inputs") and printed.count("\nplace ") == 4
    shown = printed.split("\nplace ")[1:]
    for place, text in zip((1, 3, 5, 7), shown, strict=True):
        bars = "".join(line[6:] for line in text.splitlines() if line.startswith("    | "))
        tokens = [*rows.tokens_BT[place].tolist(), int(rows.targets_BT[place, -1])]
        assert bars == data.tokenizer.decode(tokens, skip_special=False).replace("\n", "")
        first = re.search(r"  (\S+) row (\d+), tokens 0 to", text)
        assert first
        name, row = first.groups()
        source = documents(300, 7) if name == "rows.jsonl" else documents(150, int(name[0]))
        assert bars.split("<|endoftext|>")[0] in source[int(row) - 1]
    passage = data.tokenizer.decode(rows.tokens_BT[3, :14].tolist())
    show.main([str(tmp_path / "run"), "--find", passage])
    assert "step 7: " in capsys.readouterr().out
    show.main([str(tmp_path / "run"), "--find", "nobody wrote this"])
    assert capsys.readouterr().out == "'nobody wrote this': in 0 of the 9 steps so far\n"

    shutil.move(tmp_path / "run", tmp_path / "moved")
    command = [sys.executable, "-m", "dist_lm.score", "--ckpt", str(tmp_path / "moved"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_env())
    scored = {of["name"]: of["figures"]["val_loss"] for of in json.loads(done.stdout)["sets"]}
    evaluations = [e for e in read_metrics(tmp_path / "moved")[1] if e["step"] == 9]
    assert list(scored) == [e["val_set"] for e in evaluations] and len(scored) > 1
    for evaluation in evaluations:
        loss = scored[evaluation["val_set"]]
        assert loss == pytest.approx(evaluation["val_loss"], rel=1e-6)


def show_config(run: Path) -> tuple[Config, Dataset]:
    settings = show.read_yaml(run / "config.yaml")
    config = show.resolve(("run", settings), ("test", {"run.dir": str(run), "data.workers": 0}))
    return config, history.open_data(config)
