"""What would cost too much on hundreds of ranks is divided among them, or done once."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dist_lm import evaluation, loop
from dist_lm.checkpoint import folder as step_folder
from dist_lm.checkpoint import load
from dist_lm.cli import load as load_config
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.model import hf, init
from dist_lm.outcome import TRAIN, Attempt
from dist_lm.runtime import start
from tests.procs import finish, start_ranks
from tests.test_train import tiny

WORLD = 3
MARK = "counted: "


def counts_of_ranks(*words: str, **env: str) -> list[dict[str, Any]]:
    """What each rank of a run did, by rank."""
    arguments = ", ".join(map(repr, words))
    code = f"from tests.runtime import test_scale; test_scale.train_counting({arguments})"
    got, output = finish(start_ranks(WORLD, "-c", code, **env))
    assert got == 0, output
    found = [json.loads(line.partition(MARK)[2]) for line in output.splitlines() if MARK in line]
    assert len(found) == WORLD, output
    return sorted(found, key=lambda counts: counts["rank"])


def train_counting(*words: str) -> None:
    """As a rank: train, and print what this rank did."""
    counts: dict[str, Any] = {
        "rank": int(os.environ["RANK"]),
        "made": [],  # names of initial weights
        "read": 0,  # elements from a checkpoint
        "hashed": [],  # files of it
        "shards": 0,  # whose sizes were looked at
        "inputs": 0,
        "samples": 0,
        "groups": 0,  # of processes
    }
    wrap(init, "initial_value", lambda _, __, name, ___: counts["made"].append(name))
    wrap(hf, "import_part", lambda _, __, out, ___: add(counts, "read", out.numel()))
    wrap(step_folder, "_check_file", lambda path, _, __: counts["hashed"].append(path.name))
    wrap(TokenShards, "check_sizes", lambda _: add(counts, "shards", 1))
    wrap(start, "_as_seen_here", lambda _: add(counts, "inputs", 1))
    wrap(evaluation, "sample", lambda *_, **__: add(counts, "samples", 1))
    wrap(dist, "new_group", lambda **_: add(counts, "groups", 1))
    assert load.hf is hf
    config, _ = load_config(list(words), TRAIN)
    loop.run_to_end(config, Attempt(Path(config.run.dir)))
    print(MARK + json.dumps(counts))


def wrap(where: Any, name: str, note: Any) -> None:
    """Call `note` with the arguments of each call of a function."""
    function = getattr(where, name)

    def noting(*arguments: Any, **named: Any) -> Any:
        note(*arguments, **named)
        return function(*arguments, **named)

    setattr(where, name, noting)


def add(counts: dict[str, Any], name: str, number: int) -> None:
    counts[name] += number


def test_large_worlds_connect_only_ranks_that_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
    for world, lazily in ((64, None), (65, "1")):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        start._make_room_for_sockets()
        assert os.environ.get("TORCH_GLOO_LAZY_INIT") == lazily
    del os.environ["TORCH_GLOO_LAZY_INIT"]
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))


@pytest.mark.slow
def test_ranks_divide_the_work_of_a_start(prepared: Path, tmp_path: Path) -> None:
    """Also where connections are only made between ranks that exchange, as in large worlds."""
    run = str(tmp_path / "run")
    words = tiny(prepared, "--run.dir", run, "--run.eval_every", "3", "--run.steps", "6")
    begun = counts_of_ranks(*words, "--run.stop_after", "3", TORCH_GLOO_LAZY_INIT="1")
    resumed = counts_of_ranks(*words)

    made = [name for counts in begun for name in counts["made"]]
    assert len(made) == len(set(made)) > 10
    assert all(counts["made"] for counts in begun)
    assert not any(counts["made"] for counts in resumed)

    read = [counts["read"] for counts in resumed]
    assert max(read) < 0.5 * sum(read)  # before, each read everything
    files = {path.name for path in next((tmp_path / "run").glob("step-*3")).iterdir()}
    hashed = [name for counts in resumed for name in counts["hashed"]]
    assert sorted(hashed) == sorted(files - {"manifest.json"})
    assert all(counts["hashed"] for counts in resumed)

    for counts in (*begun, *resumed):
        is_first = counts["rank"] == 0
        assert counts["shards"] == 2 * is_first  # train and val
        assert counts["inputs"] == is_first
        assert counts["samples"] == is_first
        assert counts["groups"] == 1  # of checkpoints; a lone prepared folder needs no other
