"""The runtime: agreements of several real processes, and refusing silent degradation."""

import time
from pathlib import Path

import pytest
import torch

from dist_lm.config import Config, RunConfig
from dist_lm.errors import DataError, UserError
from dist_lm.runtime.start import refuse_silent_single, start
from dist_lm.runtime.world import Runtime
from tests.procs import finish, start_ranks


def in_ranks(world: int, function: str, *arguments: str) -> str:
    """Run a function of this file in fresh processes with gloo between them; what they printed."""
    listed = ", ".join(map(repr, arguments))
    code = f"from tests.runtime import test_world; test_world.{function}({listed})"
    got, output = finish(start_ranks(world, "-c", code))
    assert got == 0, output
    return output


def started(folder: str) -> Runtime:
    return start(Config(run=RunConfig(dir=folder, trackers=())))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_agreements(tmp_path: Path, world: int) -> None:
    output = in_ranks(world, "agreements", str(tmp_path))
    assert output.count("all agreed") == world


def agreements(folder: str) -> None:
    """Every agreement once, with sizes and refusals that differ between ranks."""
    runtime = started(folder)
    rank, world = runtime.rank, runtime.world_size
    assert runtime.sum(torch.tensor([1.0 + rank])).item() == world * (world + 1) / 2
    assert runtime.channel.gather({"rank": rank, "text": "é" * rank}) == [
        {"rank": other, "text": "é" * other} for other in range(world)
    ]
    assert runtime.on_main(lambda: {"who": rank}) == {"who": 0}
    assert runtime.on_main(lambda: time.sleep(2.5)) is None  # longer than one look at it

    def refuse() -> None:
        raise DataError("not like this")

    for ask in (runtime.on_main, runtime.together):
        with pytest.raises(UserError, match=r"not like this") as error:
            ask(refuse)
        assert error.value.code == 65
    if world > 1:
        with pytest.raises(UserError, match=r"^rank 1: not like this$"):
            runtime.together(lambda: refuse() if rank == 1 else None)
    assert runtime.together(lambda: rank) == rank
    runtime.close()
    print("all agreed")


def test_one_process_instead_of_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(
        UserError,
        match="accelerate started one process although more were asked for .* use: accelerate",
    ):
        refuse_silent_single()
    monkeypatch.delenv("MASTER_ADDR")
    refuse_silent_single()
