"""ZeRO-1, 2 and 3 by the real DeepSpeed on CPU: the same curve as one process, and resuming from
and to anything.
"""

import ctypes.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_lm import loop, resume
from dist_lm.checkpoint.folder import step_folders
from dist_lm.checkpoint.load import read_model
from dist_lm.checkpoint.save import Saver
from dist_lm.cli import load, resolve
from dist_lm.errors import UserError
from dist_lm.metrics import Metrics
from dist_lm.outcome import TRAIN, Attempt
from dist_lm.runtime import start as runtime_start
from dist_lm.runtime.async_io import only_builder
from dist_lm.runtime.engine import Engine
from dist_lm.runtime.strategy import Strategy, choose_strategy, refuse_combinations
from dist_lm.runtime.zero import ZeroEngine
from tests.procs import ROOT, clean_env, entry, finish, free_port, start_ranks, train
from tests.test_train import assert_same_bits, assert_same_curve, losses, tensors, tiny

MUON = ("--optim.name", "muon", "--optim.lr", "2e-3")
SGD = ("--optim.name", "sgd", "--optim.lr", "0.5")


def spread(run: Path, strategy: str, world: int, *arguments: str) -> str:
    """Train under a strategy; `single` and `ddp` need no --launch."""
    launch = ("--launch", strategy) if strategy.startswith("zero") else ()
    return train(run, *arguments, *launch, world=world)


def accelerate_launch(run: Path, file: str | Path, *arguments: str) -> tuple[int, str]:
    """What a user types on one machine, for two processes; its exit code and what all printed."""
    command = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(file),
        "--num_processes",
        "2",
    )
    command += ("--main_process_port", str(free_port()), "dist_lm/train.py", "--run.dir", str(run))
    return finish(start_ranks(1, *command, *arguments), 840)


# --- one curve


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world"),
    [("zero1", 2), ("zero2", 2), ("zero3", 3), ("zero2-offload", 2), ("zero3-offload", 2)],
)
def test_the_curve_does_not_know_the_strategy(
    prepared: Path, tmp_path: Path, one_process: Path, strategy: str, world: int
) -> None:
    """With dropout and accumulation, evaluations and samples in between; DeepSpeed says which
    engine it is.
    """
    spread(tmp_path / "run", strategy, world, *tiny(prepared, *CURVE), "--data.micro_batch", "2")
    assert_same_curve(tmp_path / "run", one_process, 1e-5)
    assert [e["val_loss"] for e in evaluations(tmp_path / "run")] == pytest.approx(
        [e["val_loss"] for e in evaluations(one_process)], rel=1e-5
    )
    assert (tmp_path / "run/samples.md").read_text() == (one_process / "samples.md").read_text()
    folder, reference = step_folders(tmp_path / "run")[-1], step_folders(one_process)[-1]
    state = json.loads((folder / "state.json").read_text())
    assert (state["strategy"], state["world_size"]) == (strategy, world)
    names = {path.name: path.stat().st_size for path in reference.glob("*.safetensors")}
    assert {path.name: path.stat().st_size for path in folder.glob("*.safetensors")} == names
    for name in names:  # the same layout whatever wrote it
        assert header(folder / name) == header(reference / name)
    # No pickle: beside the card every file is one of two kinds, by what is in it.
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.name != "README.md":
            json.loads(path.read_text())


CURVE = (
    "--run.steps",
    "20",
    "--model.dropout",
    "0.1",
    "--run.eval_every",
    "10",
    "--run.eval_batches",
    "2",
)


@pytest.fixture(scope="module")
def one_process(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    train(run, *tiny(prepared, *CURVE))
    return run


def evaluations(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_loss" in line]


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world", "optimizer"),
    [
        pytest.param("zero1", 3, MUON, marks=pytest.mark.campaign),
        ("zero3", 3, MUON),
        ("zero2", 2, ("--optim.name", "lion")),
        ("zero3", 2, SGD),
    ],
    ids=["zero1-muon", "zero3-muon", "zero2-lion", "zero3-sgd"],
)
def test_other_optimizers_give_the_update_of_one_process(
    prepared: Path, tmp_path: Path, strategy: str, world: int, optimizer: tuple[str, ...]
) -> None:
    common = tiny(prepared, *optimizer)
    train(tmp_path / "one", *common)
    spread(tmp_path / "spread", strategy, world, *common)
    assert_same_curve(tmp_path / "spread", tmp_path / "one", 1e-5)


@pytest.mark.slow
def test_bf16_means_the_same(prepared: Path, tmp_path: Path) -> None:
    common = tiny(prepared, "--run.precision", "bf16")
    train(tmp_path / "one", *common)
    for strategy in ("zero2", "zero3"):
        spread(tmp_path / strategy, strategy, 2, *common)
        ours, alone = losses(tmp_path / strategy), losses(tmp_path / "one")
        assert [s["loss"] for s in ours] == pytest.approx([s["loss"] for s in alone], rel=1e-3)
        assert {t.dtype for t in tensors(step_folders(tmp_path / strategy)[-1]).values()} == {
            torch.float32
        }


@pytest.mark.slow
def test_compiled_recomputed_and_masked(prepared: Path, tmp_path: Path) -> None:
    common = tiny(
        prepared, "--model.dropout", "0.1", "--data.document_mask", "true", "--model.layers", "1"
    )
    train(tmp_path / "one", *common)
    more = ("--run.activation_checkpointing", "true", "--data.micro_batch", "2")
    spread(tmp_path / "zero2", "zero2", 2, *common, *more)
    assert_same_curve(tmp_path / "zero2", tmp_path / "one", 1e-5)
    spread(tmp_path / "compiled", "zero3", 2, *common, "--run.compile", "true")
    assert_same_curve(tmp_path / "compiled", tmp_path / "one", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_the_settings_for_gpus_give_the_same_curve(
    prepared: Path, tmp_path: Path, strategy: str
) -> None:
    """Overlapped sums, whole blocks gathered at once, few of them: as far as a CPU can run that."""
    common = tiny(prepared, "--model.layers", "5", "--data.micro_batch", "2", "--run.steps", "6")
    words = ("--run.dir", str(tmp_path / "gpu"), *common, "--launch", strategy)
    code = f"from tests.runtime import test_zero; test_zero.train_as_on_gpus(*{words})"
    got, output = finish(start_ranks(2, "-c", code, strategy))  # forked with DeepSpeed imported
    assert got == 0, output
    limit = 3 * 16_448 + 264 * 32 + 32  # elements of three blocks, the embedding and the last norm
    made = {"zero1": "overlap True, blocks [], limit 1000000000"}
    made["zero3"] = f"overlap True, blocks [True, True, True, True, True], limit {limit}"
    assert output.count(f"{made[strategy]}\n") == 2, output
    train(tmp_path / "one", *common)
    assert_same_curve(tmp_path / "gpu", tmp_path / "one", 1e-5)


def train_as_on_gpus(*words: str) -> None:
    """As a rank: train with DeepSpeed's settings for GPUs, and print what it made of them."""
    settings, prepare = runtime_start.zero_settings, ZeroEngine.prepare

    def noted_prepare(engine: ZeroEngine, *arguments: Any) -> None:
        engine.on_gpu = True
        prepare(engine, *arguments)
        blocks = [block._z3_leaf for block in engine.bare.blocks if hasattr(block, "_z3_leaf")]
        made = engine.model._config.zero_config
        overlap = engine.model.zero_overlap_comm()
        said = f"overlap {overlap}, blocks {blocks * (engine.stage == 3)}"
        print(f"{said}, limit {made.max_live_parameters}", flush=True)
        assert made.max_reuse_distance == made.max_live_parameters

    runtime_start.zero_settings = lambda *arguments, on_gpu: settings(*arguments, on_gpu=True)
    ZeroEngine.prepare = noted_prepare
    config, flags = load(list(words), TRAIN)
    loop.run_to_end(config, Attempt(Path(config.run.dir)), flags.launch)


# --- one checkpoint


@pytest.mark.slow
@pytest.mark.long
def test_every_strategy_reads_every_other(prepared: Path, tmp_path: Path) -> None:
    """One save under each of DDP and ZeRO-1, 2, 3; ranks started once under each continue all four,
    one by one.
    """
    common = tiny(prepared, "--run.steps", "8")
    train(tmp_path / "one", *common)
    worlds = {"ddp": 2, "zero1": 3, "zero2": 2, "zero3": 3}
    for strategy, world in worlds.items():
        spread(tmp_path / strategy, strategy, world, *common, "--run.stop_after", "4")
    for after, world in worlds.items():
        for before in worlds:
            shutil.copytree(tmp_path / before, tmp_path / f"{before}-{after}")
        arguments = f"{str(tmp_path)!r}, {list(worlds)}, {after!r}, {common}"
        code = f"from tests.runtime import test_zero; test_zero.go_on({arguments})"
        got, output = finish(
            start_ranks(world, "-c", code, after)
        )  # forked with DeepSpeed imported
        assert got == 0, output
        for before in worlds:
            assert f"resuming step-00000004, written by {before} x {worlds[before]}" in output
            assert_same_curve(tmp_path / f"{before}-{after}", tmp_path / "one", 1e-5, first_step=5)


def go_on(folder: str, before: list[str], after: str, common: list[str]) -> None:
    """As a rank under `after`: finish each of the runs in turn, with one engine that takes over
    their checkpoints.
    """
    config, _ = load(["--run.dir", f"{folder}/{before[0]}-{after}", *common], TRAIN)
    runtime = runtime_start.start(config, after if after.startswith("zero") else None)
    run = None
    for strategy in before:
        config, _ = load(["--run.dir", f"{folder}/{strategy}-{after}", *common], TRAIN)
        place = resume.find_resume_point(runtime, config, [])
        assert place and place.folder
        if run is None:
            run = resume.build(runtime, config, place)
        else:
            run.config, run.saver = config, Saver(Path(config.run.dir), runtime.background)
            run.metrics = Metrics(
                config.run.dir,
                steps=8,
                flops_per_token=1.0,
                device=runtime.device,
                world_size=runtime.world_size,
                is_main=runtime.is_main,
                track=None,
            )
            resume.restore_or_init(run, place)
        loop.train(run)
        run.metrics.close()
    runtime.close()


@pytest.mark.campaign  # test_streaming.py has another for CI
def test_a_chain_of_strategies_is_one_run(prepared: Path, tmp_path: Path) -> None:
    common = tiny(prepared, "--run.steps", "50", "--model.dropout", "0.1", *MUON)
    train(tmp_path / "one", *common)
    chain = [("single", 1), ("zero3", 4), ("zero1", 2), ("ddp", 2), ("zero2", 4)]
    for part, (strategy, world) in enumerate(chain, 1):
        spread(tmp_path / "chain", strategy, world, *common, "--run.stop_after", str(10 * part))
    assert_same_curve(tmp_path / "chain", tmp_path / "one", 1e-5)


@pytest.mark.slow
def test_offload_writes_and_reads_the_same_checkpoint(prepared: Path, tmp_path: Path) -> None:
    common = tiny(prepared, "--run.steps", "12")
    train(tmp_path / "one", *common)
    for part, strategy in enumerate(["ddp", "zero2-offload", "zero3-offload", "zero1"], 1):
        spread(tmp_path / "chain", strategy, 2, *common, "--run.stop_after", str(3 * part))
    assert_same_curve(tmp_path / "chain", tmp_path / "one", 1e-5)


@pytest.mark.campaign  # DeepSpeed's async I/O is compiled first: minutes. .ci/run has it at its end
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    ctypes.util.find_library("aio") is None, reason="DeepSpeed's NVMe offload needs libaio-dev"
)
def test_offload_to_nvme(prepared: Path, tmp_path: Path) -> None:
    """Large enough that pieces do go to disk; takes over DDP's checkpoint and hands one on."""
    launch = tmp_path / "nvme.yaml"
    launch.write_text(
        (ROOT / "launch/zero3-nvme.yaml").read_text().replace("/tmp", str(tmp_path / "disk"))
    )
    common = tiny(prepared, "--model.width", "256", "--model.layers", "3", "--run.steps", "9")
    train(tmp_path / "one", *common)
    spread(tmp_path / "chain", "ddp", 2, *common, "--run.stop_after", "3")
    more = ("--launch", str(launch), "--run.stop_after", "6")
    code, output = accelerate_launch(tmp_path / "chain", launch, *common, *more)
    assert code == 0 and f"offloading to files in {tmp_path / 'disk'}\n" in output, output
    assert len(list((tmp_path / "disk").rglob("exp_avg*.swp"))) >= 4  # both moments, both ranks
    spread(tmp_path / "chain", "zero1", 2, *common)
    assert_same_curve(tmp_path / "chain", tmp_path / "one", 1e-5)


def test_one_process_builds_and_a_killed_one_blocks_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait, say for whom, and not for ever; torch's lock of a builder that is gone is
    removed.
    """
    monkeypatch.setenv("RANK", "0")
    code = (  # without dist_lm, whose import takes longer than all the rest
        "import fcntl, os, sys, time\n"
        "file = open(sys.argv[1] + '/builder', 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        " file.write(str(os.getpid()))\n"
        "file.flush(); open(sys.argv[1] + '/lock', 'w'); print('building', flush=True);"
        " time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, env=clean_env(), stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout and other.stdout.readline() == "building\n"
            with pytest.raises(
                UserError, match=f"process {other.pid} builds for 0 s already; rule: end it"
            ) as refused:
                only_builder([tmp_path], wait_seconds=0.3).__enter__()
        finally:
            other.kill()
    assert refused.value.code == 70
    assert capfd.readouterr().err == f"waiting until process {other.pid} has built in {tmp_path}\n"
    with only_builder([tmp_path], wait_seconds=2.0):
        assert not (tmp_path / "lock").exists()
        assert (tmp_path / "builder").read_text() == str(os.getpid())
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_training_goes_on_after_evaluations_with_averages(prepared: Path, tmp_path: Path) -> None:
    """An evaluation samples text, and then the averages take the place of the weights."""
    words = ("--run.steps", "4", "--run.eval_every", "2", "--run.eval_batches", "1")
    output = spread(tmp_path / "run", "zero3", 2, *tiny(prepared, *words, "--run.ema", "0.9"))
    assert output.count("val of ema: loss") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world"), [("zero1", 2), pytest.param("zero3", 4, marks=pytest.mark.campaign)]
)
def test_resumed_in_place_it_is_bit_identical(
    prepared: Path, tmp_path: Path, strategy: str, world: int
) -> None:
    common = tiny(
        prepared,
        "--model.dropout",
        "0.1",
        "--run.ema",
        "0.9",
        "--run.save_every",
        "5",
        "--run.keep_last",
        "3",
    )
    spread(tmp_path / "whole", strategy, world, *common)
    shutil.copytree(tmp_path / "whole/step-00000005", tmp_path / "again/step-00000005")
    spread(tmp_path / "again", strategy, world, *common)
    last = "step-00000012"
    assert_same_bits(tmp_path / "again" / last, tmp_path / "whole" / last)


@pytest.mark.slow
def test_the_average_of_the_weights(prepared: Path, tmp_path: Path) -> None:
    """The same under every strategy; evaluated beside the weights, read by generate and score when
    asked.
    """
    common = tiny(
        prepared,
        "--run.ema",
        "0.9",
        "--run.eval_every",
        "12",
        "--run.save_every",
        "1",
        "--run.keep_last",
        "12",
    )
    train(tmp_path / "one", *common)
    spread(tmp_path / "zero3", "zero3", 2, *common)
    spread(tmp_path / "zero1", "zero1", 2, *common)
    average = None
    start = read_model(str(step_folders(tmp_path / "one")[0]))[0].state_dict()
    for folder in step_folders(tmp_path / "one"):
        now = read_model(str(folder))[0].state_dict()
        kept = read_model(str(folder), average=True)[0].state_dict()
        if average is not None:
            average = {name: 0.9 * average[name] + 0.1 * now[name] for name in now}
            assert all(torch.allclose(average[name], kept[name], atol=1e-6) for name in now)
        average = kept
    assert start.keys() == average.keys()
    assert not torch.equal(average["embed.weight"], now["embed.weight"])
    for strategy in ("zero1", "zero3"):
        other = read_model(str(tmp_path / strategy), average=True)[0].state_dict()
        assert all(torch.allclose(average[name], other[name], atol=1e-5) for name in average)
        figures = evaluations(tmp_path / strategy)
        assert [e["val_set"] for e in figures] == ["val", "val of ema"]
        assert [e["val_loss"] for e in figures] == pytest.approx(
            [e["val_loss"] for e in evaluations(tmp_path / "one")], rel=1e-5
        )
    scored = entry("score", "--ckpt", str(tmp_path / "zero3"), "--ema")
    assert float(scored.split("val_loss ")[1].split()[0]) == pytest.approx(
        figures[1]["val_loss"], rel=1e-5
    )
    entry(
        "generate",
        "--ckpt",
        str(tmp_path / "zero3"),
        "--ema",
        "--prompt",
        "a",
        "--max_new_tokens",
        "3",
    )
    train(tmp_path / "none", *tiny(prepared, "--run.steps", "1"))
    said = entry("generate", "--ckpt", str(tmp_path / "none"), "--ema", "--prompt", "a", code=66)
    assert "holds no average of its weights; rule: trained with run.ema > 0" in said


@pytest.mark.slow
def test_what_zero3_wrote_is_a_transformers_folder(prepared: Path, tmp_path: Path) -> None:
    """GPT-2's layout, whose matrices are transposed; and one process generates from it."""
    from transformers import AutoModelForCausalLM

    gpt2 = (
        "--model.positions",
        "learned",
        "--model.norm",
        "layernorm",
        "--model.activation",
        "gelu",
        "--model.bias",
        "true",
    )
    common = tiny(prepared, *gpt2, "--run.steps", "3")
    train(tmp_path / "one", *common)
    spread(tmp_path / "zero3", "zero3", 3, *common)
    ours, _, folder = read_model(str(tmp_path / "zero3"))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, ours(tokens), atol=1e-5)
    a, b = (
        load_file(step_folders(tmp_path / run)[-1] / "model.safetensors")
        for run in ("one", "zero3")
    )
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert entry(
        "generate", "--ckpt", str(tmp_path / "zero3"), "--prompt", "the ", "--max_new_tokens", "5"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"]
)
def test_a_gradient_that_is_not_finite_stops_all_ranks(
    prepared: Path, tmp_path: Path, strategy: str
) -> None:
    """One NaN, in rank 1's gradient of update 4, where every rank's loss is finite: step 4 is
    nobody's checkpoint.
    """
    config = (
        "--run.dir",
        str(tmp_path / "run"),
        *tiny(prepared, "--run.save_every", "2", "--run.ema", "0.9"),
    )
    launch = () if strategy == "ddp" else ("--launch", strategy)
    ranks = start_ranks(
        2,
        "-c",
        "from tests.runtime import test_zero; test_zero.train_with_a_nan()",
        *config,
        *launch,
    )
    _, output = finish(ranks)
    assert [rank.returncode for rank in ranks] == [76, 76], output
    assert "error: diverged at step 4: loss=" in output and "loss=nan" not in output, output
    assert [step["step"] for step in losses(tmp_path / "run")] == [1, 2, 3]
    assert [folder.name for folder in step_folders(tmp_path / "run")] == ["step-00000002"]
    assert all(t.isfinite().all() for t in tensors(tmp_path / "run/step-00000002").values())


def train_with_a_nan() -> None:
    """As a rank: train.py, but for one number of one gradient."""
    update = Engine.update
    updates = 0

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad.view(-1)[7] = torch.nan
        return grad

    def update_counted(engine: Engine) -> torch.Tensor:
        nonlocal updates
        updates += 1
        norm = update(engine)
        if updates == 3 and engine.rank == 1:
            engine.bare.blocks[1].ffn.up.weight.register_hook(spoil)
        return norm

    Engine.update = update_counted
    runpy.run_path("dist_lm/train.py", run_name="__main__")


# --- choosing a strategy


@pytest.mark.slow
def test_accelerate_launch_reads_the_same_files(prepared: Path, tmp_path: Path) -> None:
    start = (tmp_path / "run", "launch/zero2-offload.yaml", *tiny(prepared, "--run.steps", "3"))
    code, output = accelerate_launch(*start, "--launch", "zero3")
    assert (
        code == 1
        and "--launch zero3 is not what accelerate launch started (zero2-offload); rule: one"
        in output
    )
    code, output = accelerate_launch(*start)
    assert code == 0 and "zero2-offload on 2 processes" in output, output


def test_launch_files_name_their_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in clean_env().keys() ^ os.environ.keys():
        monkeypatch.delenv(name, raising=False)
    found = {
        path.stem: choose_strategy(path.stem) for path in sorted((ROOT / "launch").glob("*.yaml"))
    }
    assert {
        name: strategy.name(1 if name == "single" else 2) for name, strategy in found.items()
    } == {name: name for name in found}
    assert choose_strategy(str(ROOT / "launch/zero3.yaml")) == found["zero3"] == Strategy(stage=3)
    assert found["zero3-nvme"].nvme_path == "/tmp"
    path = tmp_path / "mine.yaml"
    deepspeed = "distributed_type: DEEPSPEED\ndeepspeed_config:"
    refusals = {
        "distributed_type: FSDP": "distributed_type=FSDP must be one of NO, MULTI_CPU",
        f"{deepspeed} {{zero_stage: 2, gradient_clipping: 3}}": (
            "deepspeed_config.gradient_clipping is not read; rule: only zero_stage"
        ),
        f"{deepspeed} {{zero_stage: 4}}": (
            "zero_stage=4 of the launch file must be 1, 2 or 3; nearest: 2"
        ),
        deepspeed: "zero_stage=none of the launch file must be 1, 2 or 3",
        "": "no readable launch file; rule: one of ddp",
    }
    for text, message in refusals.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            choose_strategy(str(path))
    # What accelerate puts into the environment for zero3-nvme.yaml: all but the folder.
    for name, value in {
        "USE_DEEPSPEED": "true",
        "MIXED_PRECISION": "no",
        "DEEPSPEED_ZERO_STAGE": "3",
        "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme",
        "DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme",
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert choose_strategy(None) == replace(found["zero3-nvme"], nvme_path=tempfile.gettempdir())
    path.write_text((ROOT / "launch/zero3-nvme.yaml").read_text().replace("/tmp", "/disk"))
    assert choose_strategy(str(path)).nvme_path == "/disk"
    with pytest.raises(
        UserError,
        match=r"--launch zero4: no readable launch file; rule: one of ddp, .*did you mean",
    ):
        choose_strategy("zero4")


def test_without_a_launcher_it_says_how(tmp_path: Path) -> None:
    output = train(tmp_path / "run", "--launch", "zero3", code=2)
    assert (
        "--launch zero3 needs ranks that a launcher started; nearest: torchrun --nproc-per-node 1"
        in output
    )


@pytest.mark.parametrize(
    ("settings", "strategy", "message"),
    [
        (
            {"run.precision": "fp16"},
            Strategy(2),
            "run.precision=fp16 is not available under zero2: .*nearest: bf16",
        ),
        (
            {"optim.name": "adafactor"},
            Strategy(1),
            "optim.name=adafactor is not available under zero1: .*nearest: adamw",
        ),
        (
            {"optim.name": "muon"},
            Strategy(2, "cpu"),
            "optim.name=muon is not available under zero2-offload: only AdamW",
        ),
    ],
)
def test_what_does_not_work_is_refused_by_name(
    settings: dict[str, str], strategy: Strategy, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        refuse_combinations(strategy, resolve(("test", settings)))
