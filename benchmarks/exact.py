"""A step with run.exact against a plain one.

    torchrun --nproc-per-node 2 benchmarks/exact.py quickstart
    torchrun --nproc-per-node 2 benchmarks/exact.py 30m 5       # five rounds instead of 15

The same model and rows, in turns of one process group. Each process has one thread on a CPU, as
run.exact wants. Three ways take turns: run.exact with its units, DDP with the same micro-batch, and
DDP with a rank's whole share in one pass. A figure is the median over all rounds; CPU seconds, of
all threads of rank 0, hardly depend on what else a machine does.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dist_lm.cli import resolve
from dist_lm.config import Config, batch_layout
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights, parameter_shapes
from dist_lm.optim import make_optimizer, set_lr
from dist_lm.outcome import Attempt
from dist_lm.runtime.engine import ReplicatedEngine
from dist_lm.runtime.exact import ExactEngine
from dist_lm.runtime.start import start
from dist_lm.runtime.world import Runtime

SIZES: dict[str, dict[str, Any]] = {
    "quickstart": {"data.global_batch": 16, "data.micro_batch": 4},
    "30m": {
        "model.layers": 8,
        "model.heads": 8,
        "model.width": 512,
        "data.global_batch": 8,
        "data.micro_batch": 2,
    },
    "124m": {
        "model.layers": 12,
        "model.heads": 12,
        "model.width": 768,
        "data.seq_len": 1024,
        "data.global_batch": 64,
        "data.micro_batch": 16,
        "run.precision": "bf16",
    },
}
VOCABULARY = {"quickstart": 2048, "30m": 8192, "124m": 50257}
ROUNDS = 15
WARM_UP = 1  # rounds


class Way:
    """An engine with a model of its own, and this rank's rows."""

    def __init__(self, runtime: Runtime, kind: type[ReplicatedEngine], config: Config, vocab: int):
        spec = config.model_spec(vocab)
        self.config = config
        self.engine = kind(runtime.accelerator, config, runtime.engine.strategy)
        with self.engine.construction():
            model = GPT(spec)
        optimizer = make_optimizer(model, config.optim, config.run.precision)
        self.engine.prepare(model, optimizer, parameter_shapes(spec), runtime.channel)
        parts = ((part.name, part.start, part.weight) for part in self.engine.owned())
        init_weights(model, 1, parts)
        set_lr(optimizer, 1e-3)
        self.layout = batch_layout(config, runtime.world_size)
        generator = torch.Generator().manual_seed(runtime.rank)
        shape = (self.layout.micro_batch, config.data.seq_len)
        self.tokens = torch.randint(vocab, shape, generator=generator).to(runtime.device)
        self.targets = float(config.data.global_batch * config.data.seq_len)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def step(self) -> None:
        strict = self.config.run.deterministic
        torch.use_deterministic_algorithms(strict)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall = time.monotonic()
        cpu = time.process_time()
        for number in range(self.layout.accumulation):
            with self.engine.micro_step(last=number == self.layout.accumulation - 1):
                loss = self.engine.model(self.tokens, self.tokens)
                self.engine.backward(loss / self.targets)
        self.engine.update().item()
        self.wall.append(time.monotonic() - wall)
        self.cpu.append(time.process_time() - cpu)

    def figures(self) -> dict[str, float]:
        return {
            "ms": round(1000 * statistics.median(self.wall[WARM_UP:]), 1),
            "CPU ms": round(1000 * statistics.median(self.cpu[WARM_UP:]), 1),
        }


def main(size: str, rounds: int = ROUNDS) -> None:
    settings = SIZES[size] | {"run.trackers": []}
    plain = resolve(("benchmark", settings))
    whole = resolve(("benchmark", settings | {"data.micro_batch": None}))
    exact = resolve(("benchmark", settings | {"run.exact": True}))
    runtime = start(exact, attempt=Attempt(Path(tempfile.mkdtemp())))
    vocab = VOCABULARY[size]
    ways = {
        "exact": Way(runtime, ExactEngine, exact, vocab),
        "plain": Way(runtime, ReplicatedEngine, plain, vocab),
        "plain, whole share": Way(runtime, ReplicatedEngine, whole, vocab),
    }
    for _ in range(rounds + WARM_UP):
        for way in ways.values():
            way.step()
    parameters = sum(p.numel() for p in ways["exact"].engine.bare.parameters())
    found = {name: way.figures() for name, way in ways.items()}
    ratios = {}
    for name in ("plain", "plain, whole share"):
        pairs = zip(ways["exact"].cpu[WARM_UP:], ways[name].cpu[WARM_UP:], strict=True)
        of_rounds = sorted(ours / theirs for ours, theirs in pairs)
        ratios[name] = [round(of_rounds[len(of_rounds) * n // 4], 3) for n in (1, 2, 3)]
    line = {"size": size, "parameters": parameters, "world": runtime.world_size, **found}
    runtime.say(json.dumps(line | {"CPU of exact to that of (quartiles)": ratios}))
    runtime.close()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
