"""show.py: what it prints is what the loader read, and nothing else is guessed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_lm.config import Config, DataConfig, RunConfig, SourceConfig, batch_layout
from dist_lm.console import printable
from dist_lm.data.batches import Batches
from dist_lm.data.mix import PreparedReader
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.sources import PreparedSource
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import UserError
from dist_lm.show import main
from tests.conftest import state_of
from tests.procs import ROOT, clean_env

BATCH, LENGTH, SEED = 6, 40, 7


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """The folder of a run of 5 steps."""
    data = DataConfig(input=str(prepared), tokenizer="byte", seq_len=LENGTH, global_batch=BATCH)
    config = Config(data=data, run=RunConfig(dir="elsewhere", steps=5, seed=SEED))
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").write_text(config.to_yaml())
    return tmp_path / "RUN"


def texts(printed: str) -> list[str]:
    """The text of each place: what is behind the bars."""
    places = printed.split("\nplace ")[1:]
    return [
        "\n".join(line[6:] for line in place.splitlines() if line.startswith("    | "))
        for place in places
    ]


@pytest.mark.parametrize(("step", "world"), [(1, 1), (5, 4)])
def test_it_shows_what_the_loader_reads(run, prepared, capsys, step, world):
    main([str(run), "--step", str(step), *(["--world", str(world)] if world > 1 else [])])
    everything = capsys.readouterr().out
    shards, tokenizer = TokenShards(prepared, "train"), Tokenizer.load(prepared)
    data, shown = DataConfig(seq_len=LENGTH, global_batch=BATCH, workers=0), []
    for rank in range(world):
        layout = batch_layout(Config(data=data), world)
        source = PreparedSource("text", shards, LENGTH, LENGTH, seed=SEED)
        reader = PreparedReader(source, BATCH, rank, world)
        batches = Batches(reader, data, layout, torch.device("cpu"), eot=tokenizer.eot)
        rows = [
            [*tokens, targets[-1]]
            for micro in batches.read(step - 1).micros
            for tokens, targets in zip(
                micro.tokens_BT.tolist(), micro.targets_BT.tolist(), strict=True
            )
            if targets[-1] >= 0
        ]
        main([str(run), "--step", str(step), "--world", str(world), "--rank", str(rank)])
        printed = capsys.readouterr().out
        assert len(rows) == len(texts(printed)) > 0
        for row, place in zip(rows, texts(printed), strict=True):
            # Documents are printed one after another; their ends are the end-of-text tokens.
            assert place.replace("\n", "") == printable(
                tokenizer.decode(row, skip_special=False)
            ).replace("\n", "")
        shown += texts(printed)
    assert sorted(shown) == sorted(texts(everything)) and len(shown) == BATCH


def test_lines_name_source_shard_documents_and_span(run, prepared, capsys):
    main([str(run), "--step", "2", "--world", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 2: 6 sequences of 40 inputs and their targets (41 tokens)"
    pattern = (
        r"place (\d), rank (\d): sequence (\d+) of epoch 1,"
        r" (train-\S+\.safetensors) tokens (\d+) to (\d+)"
    )
    places = [match for line in lines if (match := re.fullmatch(pattern, line))]
    assert [(int(m[1]), int(m[2])) for m in places] == [(n, n % 3) for n in range(6)]
    assert all(int(m[6]) - int(m[5]) == LENGTH for m in places)
    spans = [
        m
        for line in lines
        if (m := re.fullmatch(r"  (\S+) row (\d+), tokens (\d+) to (\d+) of the sequence", line))
    ]
    assert {m[1] for m in spans} == {"text.txt"} and len({m[2] for m in spans}) > 3
    assert [m[3] for m in spans].count("0") == [m[4] for m in spans].count(str(LENGTH)) == BATCH


def test_the_last_step_of_epochs_is_not_full(run, prepared, capsys):
    sequences = sum(TokenShards(prepared, "train").counts(LENGTH, LENGTH))
    text = (
        (run / "config.yaml")
        .read_text()
        .replace("  steps: 5\n", "  steps: null\n")
        .replace("epochs: null", "epochs: 1")
    )
    (run / "config.yaml").write_text(text)
    last = -(-sequences // BATCH)
    main([str(run), "--step", str(last)])
    left = sequences % BATCH
    assert left and capsys.readouterr().out.startswith(f"step {last}: {left} sequences")
    with pytest.raises(
        UserError,
        match=f"--step={last + 1} must be a whole number from 1 to {last}; nearest: {last}",
    ):
        main([str(run), "--step", str(last + 1)])


def test_nothing_drives_the_terminal():
    assert printable("a\x1b[31m\tb\rc\u202ed\x9b") == "a\\x1b[31m\tb\\rc\\u202ed\\x9b"


@pytest.mark.parametrize(
    ("argv", "message", "code"),
    [
        (["RUN", "--step", "0"], "--step=0 must be a whole number from 1 to 5; nearest: 1", 2),
        (["RUN", "--step", "6"], "--step=6 must be a whole number from 1 to 5; nearest: 5", 2),
        (["RUN", "--step", "x"], "--step=x must be a whole number from 1 to 5; nearest: 1", 2),
        (
            ["RUN"],
            "RUN: rule: python -m dist_lm.show RUN --step N [--world W [--rank R]], or RUN"
            " --find TEXT",
            2,
        ),
        (["RUN", "--world", "2"], "--step=unset must be a whole number from 1 to 5; nearest: 1", 2),
        (
            ["RUN", "--step", "1", "--world", "7"],
            "--world=7 must be a whole number from 1 to 6; nearest: 6",
            2,
        ),
        (
            ["RUN", "--step", "1", "--world", "2", "--rank", "2"],
            "--rank=2 must be a whole number from 0 to 1; nearest: 1",
            2,
        ),
        (["--run", "RUN", "--step", "1"], "unknown flag --run; rule: RUN stands without a flag", 2),
        (["RUN", "--stop", "1"], "unknown flag --stop; did you mean --step?", 2),
        (
            ["--step", "1"],
            "--step 1: rule: python -m dist_lm.show RUN --step N [--world W [--rank R]], or RUN"
            " --find TEXT",
            2,
        ),
        (
            ["RUN", "--step", "1", "--run.seed", "2"],
            "RUN --step 1 --run.seed 2: rule: python -m dist_lm.show RUN --step N [--world W"
            " [--rank R]], or RUN --find TEXT",
            2,
        ),
        (
            ["RUN", "--step", "1", "2"],
            "RUN --step 1 2: rule: python -m dist_lm.show RUN --step N [--world W [--rank R]],"
            " or RUN --find TEXT",
            2,
        ),
        (["no", "--step", "1"], "no: has no config.yaml; rule: the folder of a run", 66),
    ],
)
def test_errors(run, argv, message, code, monkeypatch):
    monkeypatch.chdir(run.parent)
    with pytest.raises(UserError) as refusal:
        main(argv)
    assert (str(refusal.value), refusal.value.code) == (message, code)


def test_data_that_is_gone_or_other(run, prepared):
    step = run / "step-00000005"
    step.mkdir()
    (step / "state.json").write_text(json.dumps(state_of(5, data="other")))
    with pytest.raises(
        UserError, match=f"^{prepared}: its hashes are not those that {step} trained on$"
    ) as refusal:
        main([str(run), "--step", "1"])
    assert refusal.value.code == 65
    (step / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: not valid JSON"):
        main([str(run), "--step", "1"])
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(f"input: {prepared}", "input: gone.txt")
    )
    with pytest.raises(
        UserError,
        match=r"neither in .*/data nor prepared at data\.input=gone\.txt \(seen from here\)",
    ):
        main([str(run), "--step", "1"])


def test_a_mixture_of_prepared_folders(prepared, tmp_path, capsys):
    """Its run's own folder has no tokenizer: nothing was prepared in there."""

    def write_run(**sources):
        data = DataConfig(sources=sources, seq_len=LENGTH, global_batch=BATCH)
        config = Config(data=data, run=RunConfig(dir="elsewhere", steps=5, seed=SEED))
        (tmp_path / "config.yaml").write_text(config.to_yaml())

    shutil.copytree(prepared, tmp_path / "copy")
    write_run(a=SourceConfig(input=str(prepared)), b=SourceConfig(input=str(tmp_path / "copy")))
    main([str(tmp_path), "--step", "1"])
    assert len(texts(capsys.readouterr().out)) == BATCH
    (tmp_path / "raw.txt").write_text("raw")
    write_run(a=SourceConfig(input=str(prepared)), b=SourceConfig(input=str(tmp_path / "raw.txt")))
    with pytest.raises(
        UserError, match=r"neither in .*/data nor prepared at data\.sources\.b\.input=.*/raw\.txt "
    ):
        main([str(tmp_path), "--step", "1"])
    assert not (tmp_path / "data" / "sources").exists()


def test_a_reader_that_has_seen_enough(run):
    command = f"{sys.executable} -m dist_lm.show {run} --step 1 | true; exit ${{PIPESTATUS[0]}}"
    env = clean_env(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "python -m dist_lm.show RUN --step N" in capsys.readouterr().out
