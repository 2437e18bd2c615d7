"""What 907367e wrote is read for ever: its prepared folder, its runs, its streams' cursors.

Only command lines are used, so that no move of the code touches these tests. Batches, ids and
whatever is read from a file must be exactly what 907367e had. What is computed anew may differ by
rounding on another processor; benchmarks/same_bits.py compares that bit by bit on one machine.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.procs import ROOT, entry, train

OLD = ROOT / "tests" / "made_by_907367e"
EXPECTED = OLD / "expected"
TEXT_TIME = 1_700_000_000  # when the files of the stream were changed, in seconds since 1970
RUNS = ["on_shards", "on_stream"]
# The settings of make.sh, in today's words.
BOTH = (
    "--model.layers 1 --model.heads 2 --model.width 8 --model.ffn_width 16 --model.init xavier"
    " --data.seq_len 16 --data.global_batch 4 --optim.lr 0.01 --optim.warmup_steps 3 --run.steps 12"
    " --run.eval_every 0 --run.log_batch_hash true --run.trackers"
)
OWN = {
    "on_shards": f"--data.input {OLD / 'shards'} --run.ema 0.9",
    "on_stream": "--data.stream true --data.lanes 2 --data.tokenizer char --optim.name muon"
    " --model.dropout 0.1",
}
# A rate so small that no weight moves, and averages so slow that none takes up a gradient.
NOTHING_MOVES = (
    "--optim.lr 1e-30 --optim.betas 0.9999999999999999 0.9999999999999999"
    " --allow_change optim.lr optim.betas run.ema"
)


def flags(name: str, folder: Path) -> list[str]:
    """A run's settings; a stream reads a copy of the text that has the recorded time."""
    words = f"{BOTH} {OWN[name]}".split()
    if name == "on_stream":
        text = folder / "text"
        if not text.exists():
            shutil.copytree(OLD / "text", text)
            for file in text.iterdir():
                os.utime(file, (TEXT_TIME, TEXT_TIME))
        words += ["--data.input", str(text)]
    return words


def copied(name: str, folder: Path) -> Path:
    """A copy of an old run, to go on in."""
    run = folder / "run"
    shutil.copytree(OLD / name, run)
    return run


def steps(metrics: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_as_907367e_had_it(run: Path, name: str) -> None:
    """Batches, rates and counts exactly; losses, norms and the last tensors but for rounding."""
    ours = steps(run / "metrics.jsonl")
    theirs = steps(EXPECTED / f"{name}.metrics.jsonl")
    for key in ("step", "batch_hash", "lr", "tokens"):
        assert [s[key] for s in ours] == [s[key] for s in theirs], key
    for key in ("loss", "grad_norm"):
        expected = [s[key] for s in theirs]
        assert [s[key] for s in ours] == pytest.approx(expected, rel=1e-5), key
    last, expected_last = tensors(run / "step-00000012"), tensors(EXPECTED / name)
    assert last.keys() == expected_last.keys()
    for key, tensor in expected_last.items():
        torch.testing.assert_close(last[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_goes_on(name: str, tmp_path: Path) -> None:
    run = copied(name, tmp_path)
    output = train(run, *flags(name, tmp_path))
    assert "step-00000006" in output
    assert_as_907367e_had_it(run, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_made_again_is_the_same(name: str, tmp_path: Path) -> None:
    """From the first step on: the same initial weights, order of the data and dropout."""
    train(tmp_path / "run", *flags(name, tmp_path))
    assert_as_907367e_had_it(tmp_path / "run", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_tensor_of_an_old_checkpoint_is_read_to_the_bit(name: str, tmp_path: Path) -> None:
    """A step that moves nothing writes down what was read, on any processor.

    Muon's momentum has a decay of its own; it moves.
    """
    run = copied(name, tmp_path)
    words = flags(name, tmp_path)
    at = words.index("--optim.lr")
    words = words[:at] + words[at + 2 :]
    if "--run.ema" in words:
        words[words.index("--run.ema") + 1] = "0.9999999999999999"
    train(run, *words, *NOTHING_MOVES.split(), "--run.stop_after", "7")
    old = tensors(OLD / name / "step-00000006")
    new = tensors(run / "step-00000007")
    assert new.keys() == old.keys()
    still = {key: tensor for key, tensor in old.items() if "momentum_buffer" not in key}
    assert len(still) > 15
    for key, tensor in still.items():
        counts = key.endswith(".step")
        assert torch.equal(new[key], tensor + 1 if counts else tensor), key
        assert counts or tensor.abs().max() > 0, f"{key} is all zeros, which proves nothing"
    for file in (OLD / name / "step-00000006").glob("*.safetensors"):
        assert (run / "step-00000007" / file.name).stat().st_size == file.stat().st_size


@pytest.mark.parametrize("name", RUNS)
def test_an_old_checkpoint_generates_its_text(name: str, tmp_path: Path) -> None:
    expected = json.loads((EXPECTED / f"{name}.generated.json").read_text())
    words = "--temperature 0 --max_new_tokens 24 --json --logprobs --seed 1".split()
    made = json.loads(entry("generate", "--ckpt", str(OLD / name), "--prompt", "the cat", *words))
    assert made["tokens"] == expected["tokens"]
    assert made["text"] == expected["text"]
    assert made["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-5)


def test_an_old_prepared_folder_is_what_prepare_makes_today(tmp_path: Path) -> None:
    """The same shards to the byte, and the old ones verify."""
    entry("prepare", "--verify", str(OLD / "shards"))
    words = ["--input", str(OLD / "text"), "--tokenizer", "byte", "--processes", "1"]
    entry("prepare", *words, "--output", str(tmp_path / "shards"))
    shards = sorted(path.name for path in (OLD / "shards").glob("*.safetensors"))
    assert len(shards) == 2
    for name in [*shards, "tokenizer.json"]:
        assert (tmp_path / "shards" / name).read_bytes() == (OLD / "shards" / name).read_bytes(), (
            name
        )


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_shows_what_it_trained_on(name: str, tmp_path: Path) -> None:
    """Its own config.yaml is read, with the names that settings had then."""
    run = copied(name, tmp_path)
    words = flags(name, tmp_path)
    data = words[words.index("--data.input") + 1]
    settings = (run / "config.yaml").read_text()
    old_data = {"on_shards": "input: shards\n", "on_stream": "input: text\n"}[name]
    assert old_data in settings
    (run / "config.yaml").write_text(settings.replace(old_data, f"input: {data}\n"))
    output = entry("show", str(run), "--step", "5")
    shown = [line for line in output.splitlines() if line.startswith("    | ")]
    assert shown == (EXPECTED / f"{name}.shown.txt").read_text().splitlines()
