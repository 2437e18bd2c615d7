"""The promises of training, on real processes: the same curve however it is spread, and resuming
from anything.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from dist_lm import outcome
from dist_lm.checkpoint.folder import step_folders, verify
from dist_lm.cli import load
from dist_lm.config import Config, ModelSpec
from dist_lm.data.order import sequence_ids
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import SecurityError
from dist_lm.metrics import read_metrics
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.optim import lr_at, make_optimizer, set_lr
from dist_lm.outcome import TRAIN
from dist_lm.runtime.start import start
from tests import procs
from tests.conftest import TINY, text_of
from tests.machines import kill
from tests.procs import ROOT, Process, clean_env, entry, finish, free_port, start_ranks, train


def tiny(prepared: Path, *more: str) -> list[str]:
    """TINY on the prepared text; a flag given again in `more` stands."""
    flags = dict(zip(TINY[::2], TINY[1::2], strict=True)) | dict(
        zip(more[::2], more[1::2], strict=True)
    )
    return [
        "--data.input",
        str(prepared),
        "--run.trackers",
        *(word for pair in flags.items() for word in pair),
    ]


def losses(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run)[0]


def assert_same_curve(run: Path, other: Path, tolerance: float, first_step: int = 1) -> None:
    """Same batches by hash; loss and gradient norm equal to `tolerance`, relative."""
    a, b = ([s for s in losses(r) if s["step"] >= first_step] for r in (run, other))
    assert [s["step"] for s in a] == [s["step"] for s in b] != []
    for key in ("batch_hash", "tokens", "lr"):
        assert [s[key] for s in a] == [s[key] for s in b], key
    for key in ("loss", "grad_norm"):
        assert [s[key] for s in a] == pytest.approx([s[key] for s in b], rel=tolerance), key


def tensors(step: Path) -> dict[str, torch.Tensor]:
    files = sorted(step.glob("*.safetensors"))  # cloned: a test may overwrite a file that is mapped
    return {name: t.clone() for file in files for name, t in load_file(file).items()}


def assert_same_bits(step: Path, other: Path) -> None:
    a, b = tensors(step), tensors(other)
    assert a.keys() == b.keys() and len(a) > 20
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert (step / "README.md").read_bytes() == (other / "README.md").read_bytes()


# --- the same curve


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [pytest.param("0.0", marks=pytest.mark.campaign), "0.1"])
@pytest.mark.long
def test_the_curve_does_not_know_the_machine(prepared: Path, tmp_path: Path, dropout: str) -> None:
    common = tiny(prepared, "--run.steps", "20", "--model.dropout", dropout)
    train(tmp_path / "one", *common)
    spread: dict[str, tuple[int, list[str]]] = {
        "2 processes": (2, []),
        "3 processes, which do not divide the batch": (3, ["--data.workers", "0"]),
        "4 processes": (4, ["--data.workers", "3"]),
        "accumulation 2": (1, ["--data.micro_batch", "4"]),
        "accumulation 4": (1, ["--data.micro_batch", "2", "--data.workers", "0"]),
        "accumulation 2 on 2, which does not divide their share": (2, ["--data.micro_batch", "3"]),
        "recomputed": (1, ["--run.activation_checkpointing", "true"]),
    }
    for name, (world, more) in list(spread.items())[: 1 if dropout == "0.0" else None]:
        train(tmp_path / name, *common, *more, world=world)
        assert_same_curve(tmp_path / name, tmp_path / "one", 1e-5)


@pytest.mark.slow
def test_the_loop_is_the_textbook_s(prepared: Path, tmp_path: Path) -> None:
    """Rate, clipping, decay and the forgetting of gradients, step by step against a loop of five
    lines.
    """
    common = tiny(prepared, "--optim.clip", "0.5", "--data.micro_batch", "3")
    train(tmp_path / "run", *common)
    config, _ = load(["--run.dir", str(tmp_path / "run"), *common], TRAIN)
    shards = TokenShards(prepared, "train")
    model = GPT(ModelSpec(config.model, Tokenizer.load(prepared).vocab_size, 32))
    init_weights(model, config.run.seed)
    optimizer = make_optimizer(model, config.optim, "fp32")
    for step, figures in enumerate(losses(tmp_path / "run")):
        ids = sequence_ids(
            np.arange(8 * step, 8 * step + 8), sum(shards.counts(32, 32)), config.run.seed
        )
        tokens = torch.from_numpy(shards.read(ids, 32, 32).astype(np.int64))
        loss = model(tokens[:, :-1], tokens[:, 1:]) / (8 * 32)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        set_lr(optimizer, lr_at(config.optim, step, 12))
        optimizer.step()
        optimizer.zero_grad()
        assert (figures["loss"], figures["grad_norm"]) == pytest.approx(
            (loss.item(), norm.item()), rel=1e-5
        ), step
        assert norm > 0.5  # so that it is clipped


@pytest.mark.campaign
def test_compiled_curve(prepared: Path, tmp_path: Path) -> None:
    common = tiny(
        prepared, "--model.dropout", "0.1", "--model.layers", "1", "--data.micro_batch", "4"
    )
    train(tmp_path / "eager", *common)
    train(tmp_path / "compiled", *common, "--run.compile", "true", world=2)
    assert_same_curve(tmp_path / "compiled", tmp_path / "eager", 1e-5)


@pytest.mark.slow
def test_workers_and_document_mask(prepared: Path, tmp_path: Path) -> None:
    """Fewer targets than tokens: the loss is still over all targets of the global batch, whatever
    the split.
    """
    common = tiny(prepared, "--data.document_mask", "true", "--run.steps", "6")
    train(tmp_path / "one", *common)
    train(tmp_path / "split", *common, "--data.micro_batch", "1", "--data.workers", "0")
    assert_same_curve(tmp_path / "split", tmp_path / "one", 1e-5)
    assert losses(tmp_path / "one")[-1]["tokens"] < 6 * 8 * 32


@pytest.mark.slow
def test_optimizers_train_and_resume(prepared: Path, tmp_path: Path) -> None:
    for name, rate in (("sgd", "0.5"), ("adafactor", "3e-2")):  # test_zero.py has the others
        common = tiny(prepared, "--optim.name", name, "--optim.lr", rate, "--run.steps", "16")
        train(tmp_path / name, *common)
        assert losses(tmp_path / name)[-1]["loss"] < losses(tmp_path / name)[0]["loss"] - 0.2
        train(tmp_path / f"{name}-2", *common, "--run.stop_after", "7", world=2)
        train(tmp_path / f"{name}-2", *common, world=2)
        assert_same_curve(tmp_path / f"{name}-2", tmp_path / name, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.campaign), "fp16"])
def test_half_precision(prepared: Path, tmp_path: Path, precision: str) -> None:
    """Within 1e-2 of fp32 over 12 steps; weights and moments stay fp32; the same under one process
    and two.
    """
    train(tmp_path / "fp32", *tiny(prepared))
    common = tiny(prepared, "--run.precision", precision)
    train(tmp_path / "one", *common)
    train(tmp_path / "two", *common, world=2)
    for run in ("one", "two"):
        figures, exact = losses(tmp_path / run), losses(tmp_path / "fp32")
        assert [s["loss"] for s in figures] == pytest.approx([s["loss"] for s in exact], rel=1e-2)
        assert [s["loss"] for s in figures] != [s["loss"] for s in exact]
    saved = step_folders(tmp_path / "one")[-1]
    assert {t.dtype for t in tensors(saved).values()} == {torch.float32}


@pytest.mark.slow
def test_fp16_overflow_is_skipped_counted_and_resumed(prepared: Path, tmp_path: Path) -> None:
    """The first scale, 65536, overflows with so steep a loss; the run goes on at a smaller one."""
    common = tiny(
        prepared, "--run.precision", "fp16", "--data.global_batch", "1", "--data.seq_len", "2"
    )
    train(tmp_path / "run", *common, "--run.stop_after", "5")
    state = json.loads((tmp_path / "run/step-00000005/state.json").read_text())
    assert state["skipped_updates"] == losses(tmp_path / "run")[-1]["skipped_updates"] > 0
    train(tmp_path / "run", *common)
    train(tmp_path / "whole", *common)
    assert_same_bits(tmp_path / "run/step-00000012", tmp_path / "whole/step-00000012")


# --- resuming from anything


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.campaign)])
def test_killed_anywhere_ends_with_the_same_bits(
    prepared: Path, tmp_path: Path, world: int
) -> None:
    common = tiny(prepared, "--run.steps", "40", "--run.save_every", "7", "--model.dropout", "0.1")
    train(tmp_path / "whole", *common, world=world)
    rng = random.Random(world)
    ranks = start_ranks(world, "dist_lm/train.py", "--run.dir", str(tmp_path / "killed"), *common)
    wait_for_step(tmp_path / "killed", rng.randint(9, 30), ranks)
    while not step_folders(tmp_path / "killed"):  # steps may be faster than the disk
        time.sleep(0.001)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    finish(ranks)
    output = train(tmp_path / "killed", *common, world=world)
    assert "resuming step-000000" in output
    assert_same_bits(tmp_path / "killed/step-00000040", tmp_path / "whole/step-00000040")
    assert_same_curve(tmp_path / "killed", tmp_path / "whole", 0)


@pytest.mark.slow
def test_resumed_on_other_numbers_of_processes(prepared: Path, tmp_path: Path) -> None:
    common = tiny(prepared, "--run.steps", "60", "--model.dropout", "0.1")
    train(tmp_path / "whole", *common)
    for world, stop, micro in ((2, "10", "4"), (4, "20", "1"), (3, "30", "2"), (1, "60", "8")):
        train(
            tmp_path / "moved",
            *common,
            "--run.stop_after",
            stop,
            "--data.micro_batch",
            micro,
            world=world,
        )
    assert_same_curve(tmp_path / "moved", tmp_path / "whole", 1e-5)
    state = json.loads((tmp_path / "moved/step-00000030/state.json").read_text())
    assert (state["world_size"], state["strategy"]) == (3, "ddp")


def wait_for_step(run: Path, step: int, ranks: list[Process]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        steps = []
        if (run / "metrics.jsonl").exists():
            steps = losses(run)
        if steps and steps[-1]["step"] >= step:
            return
        assert all(rank.poll() is None for rank in ranks), "\n".join(
            rank.communicate()[0] for rank in ranks
        )
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_at_one_step(
    prepared: Path, tmp_path: Path, number: signal.Signals
) -> None:
    ranks = start_ranks(
        2,
        "dist_lm/train.py",
        "--run.dir",
        str(tmp_path / "run"),
        *tiny(prepared, "--run.steps", "100000"),
    )
    wait_for_step(tmp_path / "run", 5, ranks)
    ranks[1].send_signal(number)
    code, output = finish(ranks)
    assert code == 75, output
    (saved,) = step_folders(tmp_path / "run")
    verify(saved)
    assert losses(tmp_path / "run")[-1]["step"] == int(saved.name[5:])


@pytest.mark.slow
def test_finished_grown_and_changed(prepared: Path, tmp_path: Path) -> None:
    run, common = tmp_path / "run", tiny(prepared, "--run.stop_after", "4")
    output = train(run, *common)
    assert output.endswith(
        "step 4 is saved; unfinished: run.stop_after=4 of 12 steps; the same command without"
        " run.stop_after, or with a larger one, goes on\n"
    )
    unbuildable = "import runpy; from dist_lm.runtime import engine; engine.Engine.prepare = None; "
    script = (
        unbuildable + "runpy.run_path('dist_lm/train.py', run_name='__main__')",
        "--run.dir",
        str(run),
        *common,
    )
    code, output = finish(start_ranks(1, "-c", *script))  # it says so before it builds anything
    assert (
        code == 0
        and f"{run} is unfinished at step 4, where run.stop_after=4 ends it; to go on" in output
    ), output
    output = train(run, *tiny(prepared, "--optim.lr", "2e-3", "--model.dropout", "0.5"), code=2)
    assert (
        f"error: run.dir={run} was started with other settings (model.dropout: 0.0 -> 0.5,"
        " optim.lr: 0.001 -> 0.002);"
        " rule: a resumed run keeps its mathematics; choose another run.dir, or --allow_change"
        " model.dropout" in output
    )
    faster = ["--optim.lr", "2e-3", "--allow_change", "optim.lr"]
    shorter = tiny(prepared, *faster, "--run.steps", "6")
    output = train(run, *shorter, "--allow_change", "run.steps")
    assert losses(run)[-1]["step"] == 6
    assert output.endswith(
        f"step 6 is saved; try: python -m dist_lm.generate --ckpt {run} --prompt ...\n"
    )
    output = train(run, *tiny(prepared, *faster, "--run.steps", "8"))
    assert "run.steps grows from 6 to 8" in output and losses(run)[-1]["step"] == 8
    output = train(run, *tiny(prepared, "--run.resume", "never"), code=2)
    assert "has a history and run.resume=never; rule: an empty folder; or run.resume=auto" in output


@pytest.mark.slow
def test_an_older_step_can_be_chosen(prepared: Path, tmp_path: Path) -> None:
    run, common = tmp_path / "run", tiny(prepared, "--run.save_every", "4", "--run.keep_last", "9")
    train(run, *common)
    before = tensors(run / "step-00000012")
    output = train(run, *common, "--run.resume", str(run / "step-00000004"))
    assert (
        "step-00000012 is of another trajectory now and was renamed to replaced-0-step-00000012"
        in output
    )
    after = tensors(run / "step-00000012")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_only_bad_ones_are_refused(
    prepared: Path, tmp_path: Path
) -> None:
    run, common = tmp_path / "run", tiny(prepared, "--run.save_every", "4")
    train(run, *common)
    whole = tensors(run / "step-00000012")
    flip_a_bit(run / "step-00000012/model.safetensors")
    output = train(run, *common)
    assert (
        "passed over a damaged checkpoint: step-00000012/model.safetensors: does not match its hash"
        in output
    )
    again = tensors(run / "step-00000012")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for folder in step_folders(run):
        flip_a_bit(folder / "model.safetensors")
    assert "holds no valid checkpoint: step-00000012/model.safetensors" in train(
        run, *common, code=66
    )


@pytest.mark.slow
def test_damaged_newer_steps_do_not_cost_the_valid_ones(prepared: Path, tmp_path: Path) -> None:
    """Two damaged folders above all steps, and two of the run to keep: the run's own stay, and can
    be resumed.
    """
    run = tmp_path / "run"

    def go_on_to(step: int) -> str:
        return train(run, *tiny(prepared, "--run.save_every", "2", "--run.steps", str(step)))

    go_on_to(6)
    for step in (31, 41):
        planted = run / f"step-{step:08d}"
        shutil.copytree(run / "step-00000006", planted)
        manifest = json.loads((planted / "manifest.json").read_text())
        (planted / "manifest.json").write_text(json.dumps(manifest | {"step": step}))
        os.truncate(planted / "model.safetensors", 100)
    output = go_on_to(9)
    assert output.count("passed over a damaged checkpoint") == 2 and "step 9 is saved" in output
    assert [folder.name for folder in step_folders(run)] == [
        f"step-{step:08d}" for step in (8, 9, 31, 41)
    ]
    assert "resuming step-00000009" in go_on_to(10)


@pytest.mark.slow
def test_a_copy_of_a_step_under_another_name_can_be_resumed(prepared: Path, tmp_path: Path) -> None:
    run, common = tmp_path / "run", tiny(prepared, "--run.save_every", "4", "--run.keep_last", "9")
    train(run, *common)
    whole = tensors(run / "step-00000012")
    shutil.copytree(run / "step-00000004", run / "best")
    output = train(run, *common, "--run.resume", str(run / "best"))
    assert "resuming best" in output and "step-00000008 is of another trajectory now" in output
    again = tensors(run / "step-00000012")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert entry(
        "generate", "--ckpt", str(run / "best"), "--prompt", "the", "--max_new_tokens", "5"
    ).startswith("the")


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
def test_start_from_weights(prepared: Path, tmp_path: Path) -> None:
    """Fine-tuning: another schedule, the weights of a checkpoint; its first loss continues, its
    step is 0 again.
    """
    common = tiny(prepared, "--run.steps", "24")
    train(tmp_path / "first", *common)
    train(
        tmp_path / "second", *common, "--run.init_from", str(tmp_path / "first"), "--run.seed", "2"
    )
    assert losses(tmp_path / "second")[0]["loss"] < losses(tmp_path / "first")[0]["loss"] - 0.5
    deeper = tiny(prepared, "--run.init_from", str(tmp_path / "first"), "--model.layers", "3")
    output = train(tmp_path / "third", *deeper, code=2)
    assert f"run.init_from={tmp_path / 'first'} is another model" in output
    assert "model.layers=3 (there 2)" in output


# --- length, divergence, places


@pytest.mark.slow
def test_epochs_are_exact(prepared: Path, tmp_path: Path) -> None:
    """Two epochs of a stream whose length no batch divides: every sequence twice, the rest of the
    last step empty.
    """
    common = [
        word
        for word in tiny(
            prepared, "--data.global_batch", "37", "--data.seq_len", "64", "--run.steps", "DROP"
        )
    ]
    at = common.index("--run.steps")
    output = train(tmp_path / "run", *common[:at], *common[at + 2 :], "--run.epochs", "2")
    sequences = int(output.split(" sequences to train on")[0].split()[-1].replace(",", ""))
    assert losses(tmp_path / "run")[-1]["tokens"] == 2 * sequences * 64
    assert losses(tmp_path / "run")[-1]["step"] == -(-2 * sequences // 37)
    assert (2 * sequences) % 37 != 0


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_divergence_stops_all_ranks_and_is_never_saved(
    prepared: Path, tmp_path: Path, world: int
) -> None:
    output = train(
        tmp_path / "run",
        *tiny(prepared, "--optim.lr", "1e30", "--run.save_every", "1"),
        world=world,
        code=76,
    )
    assert "error: diverged at step" in output and "try a smaller optim.lr" in output
    for folder in step_folders(tmp_path / "run"):
        verify(folder)
        assert all(torch.isfinite(t).all() for t in tensors(folder).values())


@pytest.mark.slow
def test_refusals_before_training(prepared: Path, tmp_path: Path) -> None:
    output = train(tmp_path / "run", *tiny(prepared), code=77, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 lets torch.load run code; rule: unset it" in output
    output = train(tmp_path / "run", *tiny(prepared, "--data.seq_len", "1000000"), code=65)
    assert "data.seq_len=1000000 needs 1000001 tokens in one shard" in output


@pytest.mark.slow
def test_more_processes_than_sequences_are_refused(prepared: Path, tmp_path: Path) -> None:
    output = train(tmp_path / "run", *tiny(prepared, "--data.global_batch", "1"), world=2, code=2)
    assert "data.global_batch=1 must be at least the number of processes, 2; nearest: 2" in output


@pytest.mark.slow
def test_ranks_with_other_settings_are_refused(prepared: Path, tmp_path: Path) -> None:
    port, ranks = str(free_port()), []
    for rank in range(2):
        env = clean_env(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        command = [
            "dist_lm/train.py",
            "--run.dir",
            str(tmp_path / "run"),
            *tiny(prepared, "--run.seed", str(rank)),
        ]
        ranks.append(Process([sys.executable, *command], env=env))
    code, output = finish(ranks)
    found = re.search(
        r"error: rank 1 on \S+ has settings \(by hash\) (\w+), rank 0 on \S+ has (\w+);"
        " rule: the same on every node",
        output,
    )
    assert code == 2 and found and found[1] != found[2], output


@pytest.mark.slow
@pytest.mark.long
def test_one_run_a_folder(prepared: Path, tmp_path: Path) -> None:
    """A second start refuses, also while the first is stopped, and leaves the outcome alone; a
    killed run's lock is taken over, and its launch script hears that it may be started again.
    """
    run, common = (
        tmp_path / "run",
        tiny(prepared, "--run.steps", "100000", "--run.save_every", "50"),
    )
    first = start_ranks(1, "dist_lm/train.py", "--run.dir", str(run), *common)
    wait_for_step(run, 3, first)
    first[0].send_signal(signal.SIGSTOP)
    output = train(run, *common, code=2, world=2, DIST_LM_START_ID="second", DIST_LM_ATTEMPT="1")
    assert (
        f"error: run.dir={run} is in use by another run whose process is stopped or unreachable"
        in output
    )
    assert output.count("error: ") == 1 and "waiting for the run that holds" in output
    assert not (run / "outcome.json").exists()
    said = entry(
        "outcome", "after", "1", "1", "--run.dir", str(run), code=2, DIST_LM_START_ID="second"
    )
    assert ": config at step 0, attempt 1: run.dir=" in said and not list(run.glob(".refused*"))
    first[0].send_signal(signal.SIGCONT)
    wait_for_step(run, losses(run)[-1]["step"] + 10, first)

    first[0].kill()
    finish(first)
    assert (run / "run.lock").exists()
    said = entry(
        "outcome", "after", "1", "137", "--run.dir", str(run), code=70, DIST_LM_START_ID="first"
    )
    assert ": retryable at step " in said and outcome.read(run)["attempt"] == 1
    train(run, *tiny(prepared, "--run.steps", "5"))
    assert not (run / "run.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "world"), [("taken", 2), ("deleted", 1), ("folder", 1)])
def test_a_run_that_lost_its_folder_ends_and_writes_nothing_more(
    prepared: Path, tmp_path: Path, how: str, world: int
) -> None:
    """As where flock is granted to everybody: it is stopped, another takes the folder, and it goes
    on.
    """
    run, common = (
        tmp_path / "run",
        tiny(prepared, "--run.steps", "100000", "--run.save_every", "10"),
    )
    first = start_ranks(world, "dist_lm/train.py", "--run.dir", str(run), *common)
    wait_for_step(run, 12, first)
    for rank in first:
        rank.send_signal(signal.SIGSTOP)
    lock, text = run / "run.lock", json.dumps({"host": "elsewhere", "pid": 1})
    if how == "taken":
        lock.write_text(text)
    elif how == "deleted":
        lock.unlink()
    else:
        run.rename(tmp_path / "moved")
        run.mkdir()
    time.sleep(8)  # longer than a look is believed
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if ".step-" not in str(file)}
    for rank in first:
        rank.send_signal(signal.SIGCONT)
    code, output = finish(first, 60)
    assert code == 2, output
    why = "is now held by" if how == "taken" else "was deleted"
    assert f"error: run.dir={run} is no longer this run's ({lock} {why}" in output
    assert output.count("error: ") == 1
    assert {
        file: file.stat().st_mtime_ns for file in run.rglob("*") if ".step-" not in str(file)
    } == before


@pytest.mark.slow
def test_evaluation_is_the_same_in_any_world_and_says_so(prepared: Path, tmp_path: Path) -> None:
    common = tiny(
        prepared, "--run.eval_every", "6", "--run.eval_batches", "3", "--run.save_every", "3"
    )
    for world in (1, 3):
        train(tmp_path / str(world), *common, "--run.keep_last", "1", world=world)
    (a, b), (c, d) = read_metrics(tmp_path / "1")[1], read_metrics(tmp_path / "3")[1]
    for key in ("val_loss", "val_perplexity", "val_bits_per_byte"):
        assert (c[key], d[key]) == pytest.approx((a[key], b[key]), rel=1e-6)
    samples = (tmp_path / "3/samples.md").read_text()
    assert re.findall("## step .*", samples) == [
        f"## step {n}, loss {loss['val_loss']:.4f}, checkpoint step-{n:08d}"
        for n, loss in ((6, c), (12, d))
    ]
    # Without run.sample_prompt it is the beginning of the held-out text, of which both texts go on.
    shards = TokenShards(prepared, "val")
    prompt = Tokenizer.load(prepared).decode(shards.read([0], 32, 32)[0][:16])
    assert samples.count(f"prompt {prompt!r}\ntemperature 0.0\n```\n{prompt}") == 2
    assert (tmp_path / "1/loss.png").stat().st_size > 10_000
    # The last one, which is also the best here.
    kept = [folder.name for folder in step_folders(tmp_path / "1")]
    assert kept == ["step-00000012"]


@pytest.mark.slow
def test_trackers_and_profile(prepared: Path, tmp_path: Path) -> None:
    flags = [word for word in tiny(prepared) if word != "--run.trackers"]
    flags += ["--run.trackers", "tensorboard"]
    train(tmp_path / "run", *flags, "--run.profile_steps", "2", "--run.stop_after", "6")
    train(tmp_path / "run", *flags)
    # TensorBoard takes each folder with events for a run: there is one over both starts.
    events = list((tmp_path / "run/tensorboard").rglob("events*"))
    assert len(events) == 2 and {file.parent.name for file in events} == {"run"}
    trace = json.loads((tmp_path / "run/trace.json").read_text())
    assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])


# --- launchers


def running(run: Path) -> list[int]:
    """Processes, not yet ended, that train in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(run) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def all_gone(run: Path, seconds: float) -> bool:
    ended = time.monotonic() + seconds
    while running(run) and time.monotonic() < ended:
        time.sleep(0.1)
    return running(run) == []


LAUNCHERS = {
    "torchrun": "-m torch.distributed.run --nproc-per-node 2 --master-port",
    "accelerate": "-m accelerate.commands.launch --config_file launch/ddp.yaml --num_processes 2"
    " --main_process_port",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "after"),
    [
        ("torchrun", 0.0),
        pytest.param("torchrun", 0.3, marks=pytest.mark.campaign),
        pytest.param("torchrun", 1, marks=pytest.mark.campaign),
        ("torchrun", 2),
        ("accelerate", 0.3),
        ("torchrun", None),
    ],
)
def test_ranks_end_when_their_launcher_is_killed(
    prepared: Path, tmp_path: Path, launcher: str, after: float | None
) -> None:
    """So many seconds after the ranks appear, most of which pass in imports; or when they train."""
    run = tmp_path / "run"
    command = [sys.executable, *LAUNCHERS[launcher].split(), str(free_port()), "dist_lm/train.py"]
    command += ["--run.dir", str(run), *tiny(prepared, "--run.steps", "100000")]
    with open(tmp_path / "out", "w") as out:
        parent = Process(command, stdout=out, stderr=out)
        try:
            if after is None:
                wait_for_step(run, 3, [parent])
            else:
                deadline = time.monotonic() + 60
                while len(running(run)) < 3 and time.monotonic() < deadline:
                    time.sleep(0.05)
                time.sleep(after)
            assert len(running(run)) == 3
            parent.kill()
            parent.wait()
            assert all_gone(run, 5), (tmp_path / "out").read_text()
        finally:
            for pid in (parent.pid, *running(run)):
                kill(pid)
            parent.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "after"),
    [
        pytest.param(signal.SIGKILL, 0.0, marks=pytest.mark.campaign),
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 3, marks=pytest.mark.campaign),
        (signal.SIGSTOP, 0.0),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.campaign),
        (signal.SIGSTOP, 3),
    ],
)
def test_a_rank_that_is_lost_during_start_up_takes_the_others_along(
    prepared: Path, tmp_path: Path, how: signal.Signals, after: float
) -> None:
    """So many seconds after the ranks appear; torch would wait for it, and torchrun for them."""
    run = tmp_path / "run"
    timeout = 3 if how == signal.SIGSTOP else 100
    command = [sys.executable, *LAUNCHERS["torchrun"].split(), str(free_port())]
    command += ["dist_lm/train.py", "--run.dir", str(run), "--run.timeout_seconds", str(timeout)]
    command += tiny(prepared, "--run.steps", "100000")
    with open(tmp_path / "out", "w") as out:
        parent = Process(command, stdout=out, stderr=out)
        try:
            while len(running(run)) < 3:
                assert parent.poll() is None
                time.sleep(0.05)
            time.sleep(after)
            (victim,) = [pid for pid in running(run) if rank_of(pid) == "1"]
            os.kill(victim, how)
            imports = 15  # of torch, on a busy machine: a stopped rank is missed after them
            left = 8 if how == signal.SIGKILL else imports + timeout + 10
            assert all_gone(run, left), (tmp_path / "out").read_text()
        finally:
            for pid in (parent.pid, *running(run)):
                kill(pid)
            parent.wait()
    assert outcome.read(run).get("class", "retryable") == "retryable"


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_with_the_others(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, *LAUNCHERS["torchrun"].split(), str(free_port())]
    command += ["dist_lm/train.py", "--run.dir", str(run), "--run.timeout_seconds", "10"]
    command += tiny(prepared, "--run.steps", "100000")
    with open(tmp_path / "out", "w") as out:
        parent = Process(command, stdout=out, stderr=out)
        try:
            wait_for_step(run, 3, [parent])
            (victim,) = [pid for pid in running(run) if rank_of(pid) == "1"]
            os.kill(victim, signal.SIGSTOP)
            assert all_gone(run, 20), (tmp_path / "out").read_text()
        finally:
            for pid in (parent.pid, *running(run)):
                kill(pid)
            parent.wait()
    assert "rank 1" in outcome.read(run)["reason"]


def rank_of(pid: int) -> str:
    """The RANK of a process; empty for a launcher."""
    return psutil.Process(pid).environ().get("RANK", "")


@pytest.mark.slow
def test_accelerate_launch(prepared: Path, tmp_path: Path) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    command = ["dist_lm/train.py", *tiny(prepared, "--run.steps", "3")]

    def launch(*flags: str, run: str) -> subprocess.CompletedProcess[str]:
        return procs.run([*accelerate, *flags, *command, "--run.dir", str(tmp_path / run)])

    port = ["--main_process_port", str(free_port())]
    done = launch("--config_file", "launch/ddp.yaml", "--num_processes", "2", *port, run="two")
    assert done.returncode == 0 and "ddp on 2 processes of cpu" in done.stdout, done.stdout
    done = launch(run="one")
    assert done.returncode == 0 and "single on 1 process of cpu" in done.stdout, done.stdout
    assert_same_curve(tmp_path / "two", tmp_path / "one", 1e-5)
    if torch.cuda.is_available():
        return
    done = launch("--num_processes", "2", *port, run="silent")
    assert (
        done.returncode == 1
        and "accelerate started one process although more were asked for" in done.stdout
    )
    assert (
        "use: accelerate launch --config_file launch/ddp.yaml --num_processes N dist_lm/train.py"
        in done.stdout
    )


@pytest.mark.slow
def test_results_go_to_stdout_and_all_else_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text_of(300))
    words = tiny(tmp_path / "text.txt", "--run.eval_every", "6", "--data.separator", "\n\n")
    words += ["--data.tokenizer", "byte", "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "dist_lm/train.py", *words],
        cwd=ROOT,
        env=clean_env(),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    results = re.compile(r"step \d+(/12)?  .*|12 steps in .*|.* tokens so far, .*")
    assert [line for line in done.stdout.splitlines() if not results.fullmatch(line)] == []
    assert len(re.findall("  val: loss ", done.stdout)) == 2
    for notice in (
        "prepared 300 documents, ",
        "sequences to train on, ",
        "step 12 is saved; try: ",
    ):
        assert notice in done.stderr


@pytest.mark.slow
def test_the_guide_has_every_key_of_metrics(prepared: Path, tmp_path: Path) -> None:
    """Those of a run of a mixture in fp16, and those that a GPU, run.exact or a spike adds."""
    sources = {"web": {"input": str(prepared)}, "books": {"input": str(prepared)}}
    (tmp_path / "mixture.yaml").write_text(json.dumps({"data": {"sources": sources}}))
    words = tiny(prepared, "--run.eval_every", "6", "--run.precision", "fp16")[2:]
    words += ["--config", str(tmp_path / "mixture.yaml")]
    train(tmp_path / "run", *words, "--run.ema", "0.9")
    written = {
        "mfu",
        "memory_gb",
        "grad_hash",
        "unit_hashes",
        "batches",
        "positions",
        "done",
        "back",
    }
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        for key in json.loads(line):
            written.add(re.sub("_(web|books)$", "_NAME", key))
    guide = (ROOT / "docs/training.md").read_text()
    explained: set[str] = set()
    for table in guide.split("| key | meaning |\n|---|---|\n")[1:]:
        for row in table.split("\n\n", maxsplit=1)[0].splitlines():
            explained.update(re.findall("`([a-zA-Z_]+)`", row.split("|")[1]))
    assert explained == written


@pytest.mark.slow
def test_environment_is_not_logged(prepared: Path, tmp_path: Path) -> None:
    output = train(tmp_path / "run", *tiny(prepared, "--run.steps", "1"), A_SECRET="hunter2")
    logged = [
        p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"hunter2" in p.read_bytes()
    ]
    assert "hunter2" not in output and logged == [] and os.environ.get("A_SECRET") is None


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_warnings(
    prepared: Path, small_disk: Callable[[int], Path]
) -> None:
    """Of samples, figures, trackers and checkpoints; what can be written later is written."""
    disk = small_disk(2**23)
    run = disk / "run"
    steps = ("--run.steps", "300", "--run.eval_every", "20", "--run.save_every", "50")
    flags = tiny(prepared, *steps)
    at = flags.index("--run.trackers") + 1
    words = ["dist_lm/train.py", "--run.dir", str(run), *flags[:at], "tensorboard", *flags[at:]]
    ranks = start_ranks(1, *words)
    wait_for_step(run, 30, ranks)
    with pytest.raises(OSError, match="No space left"), open(disk / "filler", "wb", 0) as filler:
        while filler.write(bytes(4096)):
            pass
    time.sleep(3)
    (disk / "filler").unlink()
    code, said = finish(ranks)
    assert code == 0 and "Traceback" not in said, said
    assert "metrics.jsonl could not be written, the run goes on: No space left on device" in said
    verify(run / "step-00000300")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_run_folder_that_is_gone_is_an_error(prepared: Path, tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    steps = ("--run.steps", "100000", "--run.save_every", "50")
    ranks = start_ranks(1, "dist_lm/train.py", "--run.dir", str(run), *tiny(prepared, *steps))
    wait_for_step(run, 10, ranks)
    run.rename(tmp_path / "moved")
    if how == "replaced":
        shutil.copytree(tmp_path / "moved", run, ignore=shutil.ignore_patterns(".step-*"))
    code, said = finish(ranks, timeout=60)
    assert code == 2 and "is no longer this run's" in said, said


@pytest.mark.parametrize("value", ["1", "y", "YES", "true", "True", "on"])
def test_no_value_lets_torch_run_code(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    with pytest.raises(SecurityError, match=f"={value} lets torch.load run code"):
        start(Config())


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "is_told"), [(0o777, True), (0o775, False)])
def test_a_folder_that_anybody_may_write_is_told(
    prepared: Path, tmp_path: Path, mode: int, is_told: bool
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    said = train(tmp_path / "run", *tiny(prepared, "--run.steps", "1"))
    assert ("may be written by anybody" in said) == is_told
