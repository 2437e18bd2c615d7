"""Fixtures: a small text, prepared once, and settings of a run that takes milliseconds a step."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lm.channel import Channel
from dist_lm.checkpoint.layout import OwnedSlice
from dist_lm.checkpoint.save import Saver
from dist_lm.config import DataConfig, ModelSpec
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.model import hf
from dist_lm.model.gpt import GPT
from dist_lm.stop import STOP_SIGNALS

torch.set_num_threads(1)

WORDS = (
    "the a one cat dog bird tree house runs sleeps eats sees and or not under over small big red"
    " blue"
).split()

# A model that trains in milliseconds: what a test of the machinery needs of it is that every part
# is there.
TINY = (
    "--model.layers 2 --model.heads 2 --model.width 32 --data.seq_len 32 --data.global_batch 8"
    " --optim.lr 1e-3 --optim.warmup_steps 5 --run.steps 12 --run.eval_every 0 --run.save_every 0"
    " --run.log_batch_hash true"
).split()
# A run that nobody made. The default run.dir may exist: the README's first command makes it.
NO_RUN = "runs/of-no-test"


# Where temporary folders may lie in memory, and how much room all tests may need there.
MEMORY = Path("/dev/shm")
ROOM_BYTES = 4 * 2**30


def pytest_configure(config: pytest.Config) -> None:
    """Put temporary folders into memory where there is room, unless the user names a place.

    Each save waits until its files are on the disk, and thousands of files are deleted. That takes
    minutes on a disk and nothing in memory.
    """
    has_room = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM_BYTES
    if has_room:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Some stages run when asked for by name alone: `-m "not slow"` does not mean them."""
    for mark in ("campaign", "peers", "browser"):
        if mark not in config.getoption("markexpr"):
            items[:] = [item for item in items if mark not in item.keywords]
    items.sort(key=place_in_order)
    for item in items:
        for network in networks_of(item):
            item.add_marker(pytest.mark.xdist_group(network))


def networks_of(item: pytest.Item) -> list[str]:
    """Takes a while to build, so one worker of pytest -n has all its tests."""
    return [name for name in ("cluster", "hosts") if name in getattr(item, "fixturenames", ())]


def place_in_order(item: pytest.Item) -> int:
    """The longest first, so that the workers of pytest -n end at about the same time."""
    if networks_of(item):
        return 0
    for place, mark in enumerate(("long", "slow"), start=1):
        if mark in item.keywords:
            return place
    return 3


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """A test that runs a command in this process leaves no handler behind.

    Processes would inherit it.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def text_of(documents: int, seed: int = 0) -> str:
    """Sentences of a small vocabulary, so that a tiny model has something to learn."""
    rng = random.Random(seed)
    return "\n\n".join(
        " ".join(rng.choices(WORDS, k=rng.randint(20, 60))) + "." for _ in range(documents)
    )


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 300 documents of bytes."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text(text_of(300))
    data = DataConfig(
        input=str(folder / "text.txt"), separator="\n\n", tokenizer="byte", val_fraction=0.1
    )
    prepare_dataset(data, folder / "shards", 1)
    return folder / "shards"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many bytes."""
    folder = tmp_path / "small"
    folder.mkdir()

    def make(size: int) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.getuid() != 0 or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("needs a file system of its own")
        return folder

    yield make
    subprocess.run(["umount", str(folder)], capture_output=True)


def state_of(step: int, **changes: Any) -> dict[str, Any]:
    """A state.json with all that it must have."""
    return {
        "step": step,
        "tokens": 0,
        "skipped_updates": 0,
        "val_loss": None,
        "streams": {},
        "strategy": "single",
        "world_size": 1,
        "scaler": {},
        "config": {},
        "data": "",
        **changes,
    }


def owned(model: GPT, optimizer: torch.optim.Optimizer | None = None) -> list[OwnedSlice]:
    """What one process alone holds: everything."""
    return [
        OwnedSlice.part(name, 0, p.numel(), p, optimizer.state[p] if optimizer else {})
        for name, p in model.named_parameters()
    ]


def write_step(
    run: Path,
    step: int,
    model: GPT,
    texts: Mapping[str, Any],
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer | None = None,
) -> Path:
    """A step folder as train writes it, by one process."""
    saver = Saver(run, Channel(0, 1, torch.device("cpu")), keep_last=100)
    files = {name: json.dumps(content) for name, content in texts.items()}
    saver.begin(
        step,
        ModelSpec(model.config, tokenizer.vocab_size, model.seq_len),
        lambda: owned(model, optimizer),
        files,
        tokenizer,
    )
    saver.finish()
    return run / f"step-{step:08d}"


def export_tensor(entry: hf.Entry, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A tensor of a model file, from whole parameters."""
    if entry.constant:
        return hf.constant(entry)
    return entry.from_flat(params[entry.param].detach().flatten()[slice(*entry.span)])
