"""plan.py: its figures by hand, its parts against the real thing, its table as the guide has it."""

import json
import math
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from benchmarks import scaling
from dist_lm.checkpoint.folder import step_folders
from dist_lm.cli import load, read_yaml, resolve
from dist_lm.config import Config, ModelSpec, batch_layout, fields_by_name
from dist_lm.errors import UserError
from dist_lm.model.gpt import GPT
from dist_lm.optim import create_state, make_optimizer, moments
from dist_lm.outcome import TRAIN
from dist_lm.plan import PlanFlags, main
from dist_lm.planning.activations import LiveBytes, MemoryCounter, live_bytes, run_fake
from dist_lm.planning.cluster import GPUS, Cluster, GpuKind
from dist_lm.planning.estimate import (
    estimate,
    largest_micro_batch,
    recommend,
    strategies,
    with_changes,
)
from dist_lm.planning.memory import Step, ZeroBackward, memory
from dist_lm.planning.network import seconds_waiting
from dist_lm.planning.page import describe, describe_time
from dist_lm.runtime.strategy import Strategy
from dist_lm.size import checkpoint_bytes, checkpoints_kept, steps_of, vocabulary
from tests.conftest import NO_RUN, TINY
from tests.procs import ROOT, entry, run, train

GPT2 = "configs/gpt2-124m.yaml"


def recipe(name: str, **changes: object) -> Config:
    path = ROOT / "configs" / f"{name}.yaml"
    return resolve((str(path), read_yaml(path)), ("test", changes))


def tiny(**changes: object) -> Config:
    config, _ = load(TINY, TRAIN)
    return resolve(
        ("tiny", config.flat()), ("test", {"data.tokenizer": "byte", "run.dir": NO_RUN, **changes})
    )


def test_gpt2_124m_by_hand() -> None:
    """Every number worked out beside it: V 50257 (padded to 50304), T 1024, D 768, 12 layers."""
    config = recipe("gpt2-124m")
    figures = estimate(config, vocabulary(config), "ddp", Cluster("h100", 1, 8), 0.4)
    block = (
        (768 * 2304 + 2304) + (768 * 768 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768) + 4 * 768
    )
    parameters = 50257 * 768 + 1024 * 768 + 12 * block + 2 * 768
    assert figures["parameters"] == parameters == 124_439_808
    padded = parameters + (50304 - 50257) * 768
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert figures["flops_per_token"] == 6 * matrices + 12 * 12 * 768 * 1024
    assert figures["tokens"] == 19073 * 512 * 1024
    row = figures["strategies"]["ddp"]
    assert (row["weights"], row["gradients"], row["optimizer"]) == (
        4 * padded,
        4 * padded,
        8 * padded,
    )
    alone = 0.4 * 989e12 * 8 / figures["flops_per_token"]
    seconds = 512 * 1024 / alone
    # DDP's sums go beside the backward of the second micro-batch, except for the last bucket.
    one_way = 4 * padded * 7 / 8 / (0.8 * 450e9)
    assert 2 * one_way < seconds / 3
    bucket = 50e6 / padded * one_way
    assert row["efficiency"] == pytest.approx(seconds / (seconds + 2 * bucket))
    rate = alone * row["efficiency"]
    assert figures["tokens_per_second"] == pytest.approx(rate)
    assert figures["seconds"] == pytest.approx(figures["tokens"] / rate)
    assert figures["kilowatt_hours"] == pytest.approx(8 * 0.7 * figures["seconds"] / 3600)
    assert figures["checkpoint"] == 12 * parameters
    assert figures["checkpoints_kept"] == 4  # two last, the best, one being written
    assert (figures["micro_batch"], figures["accumulation"]) == (32, 2)
    zero2 = figures["strategies"]["zero2"]
    assert zero2["optimizer"] == pytest.approx(
        12 * padded / 8
    )  # fp32 copies of its share and two moments
    assert zero2["peak"] < row["peak"]


def test_activations_of_gpt2_124m_by_hand() -> None:
    """What the backward of one block needs in bf16 autocast.

    The residual stream twice in fp32, all else in bf16.
    """
    live = live_bytes(recipe("gpt2-124m"), 50257, 32, False, True)
    tokens, D, F, H = 32 * 1024, 768, 3072, 12
    residual = 2 * 4 * D + 2 * 2 * 4  # inputs of both norms, and their means and deviations
    products = 2 * (
        D + 3 * D + D + D + F + F
    )  # inputs of qkv; q, k, v; attention's output, also out's input; up, down
    block = tokens * (residual + products + 4 * H)  # and the log sums of the softmax
    weights = 2 * (12 * D * D)  # bf16 copies
    kept = 12 * (block + weights)
    assert live.activations == pytest.approx(kept, rel=0.05)


def rows(**largest: int) -> dict[str, dict[str, object]]:
    """What each strategy takes: one GB too much unless the micro-batch of 4 fits."""
    return {
        name.replace("_", "-"): {
            "needed": 1e9 if size >= 4 else 9e9,
            "fits": size >= 4,
            "largest_micro_batch": size,
        }
        for name, size in largest.items()
    }


def test_which_strategy_to_take_and_at_which_micro_batch() -> None:
    everything = rows(ddp=8, zero1=8, zero2=8, zero2_offload=8, zero3=8)
    assert recommend(everything, 4, 2e9) == {
        "launch": "ddp",
        "micro_batch": 4,
        "why": "the first that fits: 1 GB of 2 GB",
    }
    whole_before_offloaded = rows(ddp=0, zero1=2, zero2=0, zero2_offload=8, zero3=4)
    taken = recommend(whole_before_offloaded, 4, 2e9)
    assert (taken["launch"], taken["micro_batch"]) == ("zero3", 4)
    assert taken["why"].endswith("; ddp, zero1, zero2 would not")
    smaller = recommend(rows(ddp=0, zero1=2, zero2=3), 4, 2e9)
    assert (smaller["launch"], smaller["micro_batch"]) == ("zero1", 2)
    assert recommend({**rows(ddp=0), "zero1": {"refused": "x"}}, 4, 2e9)["launch"] is None


def test_the_page_says_what_to_take_and_for_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, "--data.tokenizer", "byte", "--gpus-per-node", "1", "--gpu", "h100"])
    page = capsys.readouterr().out
    assert "1 x h100, 1 node of 1;" in page and ", 1 backward pass a step\n" in page
    assert "\ntake single at micro-batch 8: the first that fits: " in page
    assert " 0 seconds, " in page and "days" not in page


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(50, "50 seconds"), (120, "2.0 minutes"), (7200, "2.0 hours"), (180000, "2.1 days")],
)
def test_times_are_in_the_unit_that_people_use(seconds: float, text: str) -> None:
    assert describe_time(seconds) == text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"run.precision": "bf16"},
        {"run.activation_checkpointing": True},
        {"model.dropout": 0.1, "model.kv_heads": 1, "model.tie_embeddings": False},
    ],
)
def test_blocks_are_alike(settings: dict[str, object]) -> None:
    """What one and two blocks and rows tell of five and seven is what these take when run whole."""
    config = tiny(**{"model.layers": 5, "data.seq_len": 64, **settings})
    inferred = live_bytes(config, 257, 7, False, False)
    data, run = config.data, config.run
    whole = run_fake(
        config.model,
        5,
        257,
        7,
        data.seq_len,
        False,
        run.precision,
        run.activation_checkpointing,
        False,
        False,
    )
    assert inferred.activations == pytest.approx(whole.forward, rel=0.01)
    assert inferred.blocks == pytest.approx(whole.blocks, rel=0.01)
    assert inferred.activations + inferred.loss == pytest.approx(whole.loss, rel=0.02)


def test_live_bytes_are_those_of_real_tensors() -> None:
    """The same watch over a real forward and backward sees the same bytes as over a fake one."""
    config = tiny(**{"data.seq_len": 64})
    model = GPT(ModelSpec(config.model, 257, 64))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    tokens = torch.zeros(8, 64, dtype=torch.int64)
    watch = MemoryCounter([*model.parameters(), *model.buffers()])
    with watch:
        model(tokens, tokens).backward()
    whole = run_fake(
        config.model, config.model.layers, 257, 8, 64, False, "fp32", False, False, False
    )
    assert watch.most == pytest.approx(max(whole[1:]), rel=0.02)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon", "adafactor"])
def test_moments_are_what_the_optimizer_keeps(name: str) -> None:
    config = tiny(**{"optim.name": name, "model.tie_embeddings": False, "model.bias": True})
    model = GPT(ModelSpec(config.model, 257, 32))
    optimizer = make_optimizer(model, config.optim, "fp32")
    create_state(optimizer)
    for parameter, p in model.named_parameters():
        kept = sum(t.shape == p.shape for t in optimizer.state[p].values())
        assert kept == moments(name, parameter) or (name == "adafactor" and p.dim() == 1), parameter


@pytest.mark.parametrize("settings", [(), ("--optim.name", "muon"), ("--run.ema", "0.9")])
def test_checkpoint_bytes_are_those_on_disk(
    prepared: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    settings = (*TINY, "--data.input", str(prepared), *settings)
    train(tmp_path / "run", *settings)
    (folder,) = step_folders(tmp_path / "run")
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    config, _ = load(settings, TRAIN)
    assert checkpoint_bytes(config, vocabulary(config)) == pytest.approx(
        written, rel=0.05
    )  # headers, Adam's step


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"run.save_every": 0}, 1),
        ({"run.save_every": 10, "run.steps": 20}, 2),
        ({"run.save_every": 1}, 4),
        ({"run.save_every": 1, "run.eval_every": 0}, 3),
        ({"run.save_every": 10, "run.keep_every": 100, "run.steps": 400}, 8),
    ],
)
def test_checkpoints_on_disk_at_once(settings: dict[str, object], number: int) -> None:
    config = resolve(("test", settings))
    assert checkpoints_kept(config, steps_of(config)) == number


def test_strategies_divide_what_they_say() -> None:
    config, vocab = recipe("llama-1b"), 32000
    found = {
        name: memory(config, strategy, 8, vocab, True) for name, strategy in strategies(8).items()
    }
    assert list(found) == [
        "ddp",
        "zero1",
        "zero2",
        "zero2-offload",
        "zero3",
        "zero3-offload",
        "zero3-nvme",
    ]
    assert (
        found["ddp"].peak > found["zero1"].peak > found["zero2"].peak > found["zero2-offload"].peak
    )
    assert (
        found["zero1"].gradients > found["zero2"].gradients
    )  # whole ones between the backward passes of a step
    assert found["zero2-offload"].host == pytest.approx(20 * found["ddp"].weights / 4 / 8)
    assert found["zero3-nvme"].disk > 0 and found["zero3-offload"].disk == 0
    assert [m.disk + m.host for m in found.values()][:3] == [0, 0, 0]
    assert "single" in strategies(1) and "ddp" not in strategies(1)


def test_zero3_keeps_three_blocks_gathered_on_gpus_alone() -> None:
    """And ZeRO-1 and 2 have two buckets there, because one fills while the other is summed."""
    config, vocab = recipe("llama-1b"), 32000
    whole = 4 * 1_100_048_384
    blocks = 22 * (2048 * 2560 + 2048 * 2048 + 3 * 2048 * 5632 + 2 * 2048)
    gathered = whole - 4 * blocks + 4 * 3 * blocks / 22
    zero3 = strategies(8)["zero3"]
    assert memory(config, zero3, 8, vocab, True).weights == pytest.approx(whole / 8 + gathered)
    assert memory(config, zero3, 8, vocab, False).weights == pytest.approx(whole / 8 + 4 * 10**9)
    step = Step(LiveBytes(0, 0, 0, 0), 4e9, 8e9, 0, 8, False, 0, True, 0)
    fixed = {stage: ZeroBackward(step, Strategy(stage=stage)).fixed for stage in (1, 2, 3)}
    assert fixed == {1: 4e8, 2: 4e8, 3: 2e8}


def test_exact_sums_take_eight_bytes_a_parameter() -> None:
    """And gradients exist beside them only while the weights move."""
    plain = with_changes(recipe("gpt2-124m"), "data", micro_batch=1)
    exact = with_changes(plain, "run", exact=True)
    one, other = (memory(config, Strategy(), 8, 50257, True) for config in (plain, exact))
    assert other.gradients == 3 * one.gradients
    assert one.gradients <= other.peak - one.peak <= 2 * one.gradients


def test_what_a_step_waits_for() -> None:
    """By hand, where a way takes 3 s, a bucket 1 s, a forward 1 s and a backward 2 s."""
    layout = batch_layout(recipe("gpt2-124m", **{"data.global_batch": 64}), 1)
    assert layout.accumulation == 2
    waiting = [seconds_waiting(stage, layout, 3.0, 1.0, 6.0) for stage in (0, 1, 2, 3)]
    assert waiting == [6 - 2, (3 - 2) + 3, 2 * (3 - 2) + 3, 2 * ((3 - 1) + (6 - 2))]
    hidden = [seconds_waiting(stage, layout, 3.0, 1.0, 600.0) for stage in (0, 1, 2, 3)]
    assert hidden == [2, 1 + 3, 2 + 3, 4]


def test_the_network_model_predicts_what_others_published() -> None:
    for row in scaling.PEERS:
        assert scaling.predicted(row) == pytest.approx(row.of_128, rel=0.1)


def test_the_guide_to_scaling_has_the_tables_of_its_command() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    for table in scaling.tables().strip().split("\n\n"):
        assert table in page


def test_a_slow_network_costs_rate_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", GPT2, "--vocab_size", "50257", "--nodes", "8", "--json"]
    rates = []
    for network in ("50", "1"):
        main([*arguments, "--network", network])
        rates.append(json.loads(capsys.readouterr().out)["tokens_per_second"])
    assert rates[1] < 0.5 * rates[0]
    main(arguments[:-1])
    assert "a step waits for exchanges at 320 GB/s (--network" in capsys.readouterr().out


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    config, strategy, cluster = recipe("llama-1b"), Strategy(), Cluster("h100")
    most = largest_micro_batch(config, strategy, cluster, 32000)
    assert 1 < most < 128
    tried = [with_changes(config, "data", micro_batch=n) for n in (most, most + 1)]
    peaks = [memory(config, strategy, 8, 32000, True).peak for config in tried]
    assert peaks[0] <= cluster.room < peaks[1]
    assert largest_micro_batch(config, strategy, Cluster("rtx4090"), 32000) == 0


@pytest.mark.slow
def test_what_does_not_fit_and_what_would() -> None:
    config = recipe("llama-7b")
    figures = estimate(config, 32000, "ddp", Cluster("h100", 8, 8), 0.4)
    first, *others = figures["advice"]
    assert re.fullmatch(r"ddp does not fit: \d+ GB of 83 GB; what would:", first)
    assert any(line.startswith("--launch zero3, micro-batches up to ") for line in others)
    assert others[-1] == "--gpu h200 or b200"
    assert not figures["strategies"]["ddp"]["fits"] and figures["strategies"]["zero3"]["fits"]
    page = describe(figures, "x.yaml")
    assert (
        "* ddp" in page
        and "none fits" in page
        and "at an MFU of 0.4 (--mfu; a guess until measured)" in page
    )
    config = recipe("llama-7b", **{"run.activation_checkpointing": False})
    spared = estimate(config, 32000, "zero3", Cluster("a100-40", 8, 8), 0.4)
    assert any(
        line.startswith("--run.activation_checkpointing true, ") for line in spared["advice"]
    )
    small = estimate(tiny(**{"optim.name": "adafactor"}), 257, "zero2", Cluster("cpu", 1, 2), 0.4)
    assert small["advice"][0].startswith("optim.name=adafactor is not available under zero2")
    assert "refused" in describe(small, "x")
    assert estimate(tiny(), 257, None, Cluster("cpu", 1, 1), 0.4)["advice"] == ["single fits"]


@pytest.mark.slow
def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "--config",
            str(ROOT / GPT2),
            "--launch",
            "zero2",
            "--gpus-per-node",
            "4",
            "--gpu",
            "a100-80",
            "--json",
        ]
    )
    figures = json.loads(capsys.readouterr().out)
    assert (figures["asked"], figures["gpu"], figures["gpus_per_node"]) == ("zero2", "a100-80", 4)
    main(["--config", str(ROOT / "configs/debug.yaml"), "--gpu", "cpu", "--gpus-per-node", "1"])
    page = capsys.readouterr().out
    assert "single fits" in page and "MALLOC_MMAP_THRESHOLD_=1048576" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gpu", "h1000"],
            "--gpu=h1000 must be one of a100-40, a100-80, h100, h200, b200, l40s, rtx4090, cpu;"
            " did you mean h100?",
        ),
        (["--nodes", "0"], "--nodes=0 must be a whole number of 1 or more; nearest: 1"),
        (
            ["--gpus_per_node", "x"],
            "--gpus_per_node=x must be a whole number of 1 or more; nearest: 8",
        ),
        (["--vocab_size", "-3"], "--vocab_size=-3 must be a whole number of 1 or more; nearest: 1"),
        (["--mfu", "40"], "--mfu=40 must be a number above 0 and at most 1; nearest: 0.4"),
        (["--mfu", "high"], "--mfu=high must be a number above 0 and at most 1; nearest: 0.4"),
        (
            ["--launch", "zero4"],
            "--launch zero4: no readable launch file; rule: one of ddp, single, zero1,"
            " zero2-offload, zero2,"
            " zero3-nvme, zero3-offload, zero3, or a path; did you mean zero3?",
        ),
        (
            ["--nodes", "3"],
            "data.global_batch=16 must be at least the number of processes, 24; nearest: 24",
        ),
        (
            ["--data.tokenizer", "char", "--run.dir", NO_RUN],
            "data.tokenizer=char and data.input=stdlib do not tell the size of the vocabulary"
            " without"
            " reading text; rule: a prepared folder, or --vocab_size N",
        ),
        (
            ["--run.epochs", "2"],
            "run.epochs=2 of data.input=stdlib is of unknown length; rule: a prepared folder, or"
            " run.steps",
        ),
        (["--lunch", "ddp"], "unknown flag --lunch; did you mean --launch?"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        main(arguments)
    assert (str(refused.value), refused.value.code) == (message, 2)


def test_vocabulary_and_length_of_prepared_data(prepared: Path) -> None:
    config = tiny(**{"data.input": str(prepared), "run.steps": None, "run.epochs": 3})
    assert vocabulary(config) == 257
    assert steps_of(config) == math.ceil(3 * sequences(prepared) / 8)
    assert vocabulary(tiny(**{"data.tokenizer": "bpe:500"})) == 500
    assert vocabulary(tiny(**{"data.tokenizer": str(prepared)})) == 257
    expected = (
        "config print_config launch nodes gpus_per_node gpu network mfu vocab_size json table"
    )
    assert set(fields_by_name(PlanFlags)) == {*expected.split(), "table"}
    assert get_args(GpuKind) == tuple(GPUS)


def sequences(prepared: Path) -> int:
    manifest = json.loads((prepared / "dataset.json").read_text())
    return sum((shard["tokens"] - 1) // 32 for shard in manifest["splits"]["train"]["shards"])


@pytest.mark.campaign
def test_the_guide_has_the_table_that_its_command_prints() -> None:
    guide = (ROOT / "docs/planning.md").read_text()
    (command,) = re.findall(r"^python -m dist_lm\.plan (--table.*)$", guide, re.MULTILINE)
    assert entry("plan", *command.split()) in guide


# Missed at 14 M parameters, see benchmarks/results/2026-11-21-plan.md.
@pytest.mark.campaign
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_memory_is_what_training_takes(strategy: str) -> None:
    """Resident memory of real training, as the claim measures it, within 10 %."""
    done = run([sys.executable, "-m", "benchmarks", f"memory-plan-{strategy}", "--results", "-"])
    assert ": met;" in done.stdout, done.stdout
