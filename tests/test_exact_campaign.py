"""The campaign of run.exact: 200 steps of every kind, killed and moved, and 2,000 against plain.

pytest -m campaign -s tests/test_exact_campaign.py
"""

import random
import time
from pathlib import Path

import numpy as np
import pytest

from dist_lm.checkpoint.folder import step_folders
from dist_lm.metrics import read_metrics
from tests.conftest import text_of
from tests.procs import start_ranks, train
from tests.test_exact import exact, figures, sha, weights_hash
from tests.test_train import tiny

pytestmark = [pytest.mark.campaign, pytest.mark.slow, pytest.mark.timeout(7200)]

STEPS = 200
LAST = f"step-{STEPS:08d}"
LONG = ["--run.steps", str(STEPS), "--run.log_unit_hashes", "true"]
KINDS: dict[str, list[str]] = {
    "adamw": [],
    "adamw with dropout": ["--model.dropout", "0.1", "--run.ema", "0.9"],
    "muon": ["--optim.name", "muon"],
    "lion": ["--optim.name", "lion", "--optim.lr", "2e-4"],
    "sgd": ["--optim.name", "sgd", "--optim.lr", "0.05"],
    "adafactor": ["--optim.name", "adafactor", "--optim.lr", "1e-2"],
    "bf16": ["--run.precision", "bf16"],
    "fp16": ["--run.precision", "fp16"],
    "recomputed": ["--run.activation_checkpointing", "true", "--data.document_mask", "true"],
    "post-norm": ["--model.norm", "layernorm", "--model.norm_placement", "post"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_hash_after_200_steps(prepared: Path, tmp_path: Path, kind: str) -> None:
    """Alone, on two, three and four, and in a chain that each of them goes on with."""
    compare(tmp_path, kind, exact(prepared, *LONG, *KINDS[kind]))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_one_hash_of_a_stream(tmp_path: Path, packing: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_of(400))
    words = ["--data.stream", "true", "--data.separator", "\\n\\n", "--data.tokenizer", "byte"]
    words += ["--data.lanes", "5", "--data.packing", packing]
    compare(tmp_path, f"stream, {packing}", exact(text, *LONG, *words))


def test_one_hash_of_a_mixture(prepared: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_of(300, seed=5))
    shards = f"shards: {{input: {prepared}, weight: 0.7}}"
    raw = f"raw: {{input: {text}, weight: 0.3}}"
    sources = f"{{{shards}, {raw}}}"
    words = exact(prepared, *LONG, "--data.stream", "true", "--data.sources", sources)
    compare(tmp_path, "mixture", words[2:])


def compare(tmp_path: Path, kind: str, words: list[str]) -> None:
    began = time.monotonic()
    train(tmp_path / "one", *words)
    expected = sha(tmp_path / "one" / LAST)
    for world, workers in ((2, 1), (3, 0), (4, 3)):
        run = tmp_path / f"{world}"
        train(run, *words, "--data.workers", str(workers), world=world)
        assert sha(run / LAST) == expected, (kind, world)
        assert figures(run) == figures(tmp_path / "one")
    chain = tmp_path / "chain"
    for number, world in enumerate((3, 1, 4, 2), 1):
        stop = str(STEPS * number // 4)
        train(chain, *words, "--run.stop_after", stop, world=world)
    assert sha(chain / LAST) == expected, (kind, "chain")
    assert figures(chain) == figures(tmp_path / "one")
    assert weights_hash(chain / LAST) == weights_hash(tmp_path / "one" / LAST)
    seconds = time.monotonic() - began
    print(f"\n{kind}: one, x 2, x 3, x 4 and chain: {expected[:16]} ({seconds:.0f} s)")


def test_killed_twenty_times_on_changing_worlds(prepared: Path, tmp_path: Path) -> None:
    """SIGKILL to all ranks at a random moment, and the next start has another world."""
    words = exact(prepared, *LONG, "--run.save_every", "8", "--model.dropout", "0.1")
    train(tmp_path / "one", *words)
    run = tmp_path / "run"
    rng = random.Random(7)
    kills = 0
    worlds = []
    while kills < 20:
        world = rng.choice([1, 2, 3, 4])
        ranks = start_ranks(world, "dist_lm/train.py", "--run.dir", str(run), *words)
        newest = newest_step(run)
        goal = newest + rng.randint(0, 7) if newest < STEPS - 16 else newest
        deadline = time.monotonic() + 120
        while recorded_step(run) < goal and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.random())
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.communicate()
        kills += 1
        worlds.append(world)
    train(run, *words, world=3)
    assert sha(run / LAST) == sha(tmp_path / "one" / LAST)
    assert figures(run) == figures(tmp_path / "one")
    print(f"\nkilled {kills} times, on {worlds}: {sha(run / LAST)[:16]}")


def newest_step(run: Path) -> int:
    folders = step_folders(run)
    return int(folders[-1].name.removeprefix("step-")) if folders else 0


def recorded_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    if not path.exists():
        return -1
    steps, _ = read_metrics(run)
    return int(steps[-1]["step"]) if steps else -1


def test_the_curve_is_that_of_a_plain_run(prepared: Path, tmp_path: Path) -> None:
    """2,000 steps of three seeds: no difference beyond that between seeds."""
    finals: dict[str, list[float]] = {"plain": [], "exact": []}
    gaps = []
    for seed in ("1", "2", "3"):
        words = ["--run.steps", "2000", "--run.seed", seed, "--run.eval_every", "500"]
        words += ["--data.micro_batch", "4", "--optim.lr", "3e-3"]
        curves = {}
        for way in ("plain", "exact"):
            run = tmp_path / f"{way}-{seed}"
            more = ["--run.exact", "true"] if way == "exact" else []
            train(run, *tiny(prepared, *words, *more))
            steps, evaluations = read_metrics(run)
            curves[way] = np.array([line["loss"] for line in steps])
            finals[way].append(evaluations[-1]["val_loss"])
        gaps.append(float(np.abs(curves["plain"] - curves["exact"])[-200:].mean()))
    print(f"\nvalidation after 2,000 steps: {finals}; mean distance of the last 200 losses: {gaps}")
    between_ways = abs(np.mean(finals["plain"]) - np.mean(finals["exact"]))
    between_seeds = np.std(finals["plain"], ddof=1)
    assert between_ways < between_seeds
    for plain, exact_loss in zip(finals["plain"], finals["exact"], strict=True):
        assert abs(plain - exact_loss) < between_seeds
