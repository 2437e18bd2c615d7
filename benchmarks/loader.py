"""Tokens a second that batches arrive with from prepared shards at sequence length 1024, on one core.

python benchmarks/loader.py
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dist_lm.cli import resolve
from dist_lm.config import DataConfig, batch_layout
from dist_lm.data.batches import Batches
from dist_lm.data.dataset import open_dataset
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.errors import UserError

T, BATCH, STEPS, ROUNDS = 1024, 16, 300, 5


def nano_gpt_batch(
    tokens: np.ndarray, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual loader of teaching code, for comparison: random windows one by one."""
    starts = rng.integers(0, len(tokens) - T, BATCH)
    x = torch.stack([torch.from_numpy(tokens[i : i + T].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
    return x, y


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare_dataset(
            DataConfig(tokenizer="byte"), Path(folder) / "shards", 1, say=lambda text: None
        )
        rates: dict[str, list[float]] = {}
        for workers in (0, 1):
            config = resolve(
                (
                    "benchmark",
                    {
                        "data.input": f"{folder}/shards",
                        "data.seq_len": T,
                        "data.workers": workers,
                        "data.global_batch": BATCH,
                        "run.dir": folder,
                    },
                )
            )
            data = open_dataset(config, lambda work: work())
            for _ in range(ROUNDS):
                batches = Batches(
                    data.open_reader(config.data),
                    config.data,
                    batch_layout(config, 1),
                    torch.device("cpu"),
                    eot=data.tokenizer.eot,
                )
                batches.take()
                began = time.monotonic()
                for _ in range(STEPS):
                    batches.take()
                rates.setdefault(f"ours, {workers} workers", []).append(
                    STEPS * BATCH * T / (time.monotonic() - began)
                )
                batches.close()
        tokens = data.train.read(np.arange(1000), T, T).reshape(-1)
        rng = np.random.default_rng(0)
        for _ in range(ROUNDS):
            began = time.monotonic()
            for _ in range(STEPS):
                nano_gpt_batch(tokens, rng)
            rates.setdefault("random windows one by one", []).append(
                STEPS * BATCH * T / (time.monotonic() - began)
            )
    for name, values in rates.items():
        print(
            f"{name:26} {statistics.median(values) / 1e6:7.1f} M tokens/s ({min(values) / 1e6:.1f} to {max(values) / 1e6:.1f})"
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
