"""A step of train.py under DDP or ZeRO against a bare loop around the same wrapped model, in turns of one run.

    torchrun --nproc-per-node 2 benchmarks/strategy_step.py zero2      # target: train.py takes <= 1.05 of the bare loop

The quickstart's model and batch, fp32. The bare loop has a ready-made batch, no metrics, no agreement between ranks. A
figure is the median over all steps of all rounds but each round's first three.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from dist_lm import loop, resume
from dist_lm.cli import resolve
from dist_lm.config import Config
from dist_lm.metrics import read_metrics
from dist_lm.runtime.start import start

ROUNDS, STEPS, FIRST = 4, 15, 3


def main(strategy: str) -> None:
    folder = Path(tempfile.gettempdir(), f"dist_lm-benchmark-{strategy}")
    config = resolve(
        (
            "benchmark",
            {
                "run.dir": str(folder),
                "run.trackers": [],
                "run.eval_every": 0,
                "run.save_every": 0,
                "run.steps": 1000,
                "run.resume": "never",
            },
        )
    )
    runtime = start(config, strategy if strategy.startswith("zero") else None)
    place = resume.find_resume_point(runtime, config, [])
    assert place, f"{folder} is finished"
    run = resume.build(runtime, config, place)
    batch = loop.training_batches(run).take()
    targets = runtime.sum(torch.tensor(float(batch.targets)))
    bare: list[float] = []
    for n in range(1, ROUNDS + 1):
        run.config = Config(
            **{**config.__dict__, "run": config.run.model_copy(update={"stop_after": n * STEPS})}
        )
        loop.train(run)
        for step in range(STEPS):
            began = time.monotonic()
            loss = runtime.engine.model(batch.micros[0].tokens_BT, batch.micros[0].targets_BT)
            scaled = loss / targets.float() * runtime.world_size
            if runtime.engine.strategy.stage:
                runtime.engine.model.backward(scaled)
                runtime.engine.model.step()
            else:
                scaled.backward()
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.optim.clip)
                run.optimizer.step()
                run.optimizer.zero_grad()
            loss.item()
            if step >= FIRST:
                bare.append(time.monotonic() - began)
    tokens = run.layout.tokens_per_step
    ours = [
        tokens / s["tokens_per_second"]
        for s in read_metrics(folder)[0]
        if (s["step"] - 1) % STEPS >= FIRST
    ]
    a, b = statistics.median(ours), statistics.median(bare)
    runtime.say(
        json.dumps(
            {
                "strategy": runtime.strategy,
                "world": runtime.world_size,
                "train.py ms": round(1000 * a, 1),
                "bare loop ms": round(1000 * b, 1),
                "ratio": round(a / b, 3),
            }
        )
    )
    runtime.close()


if __name__ == "__main__":
    main(sys.argv[1])
