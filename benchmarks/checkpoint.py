"""What saving and resuming cost: the stall of training, the whole save against the disk's own speed, the first step.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py zero3      # targets: stall <= 1.5 copies

A model of 100 M parameters, fp32, AdamW. A copy is this rank's bytes of weights and moments copied once into memory that
was used before; the disk's speed is that of all ranks writing and syncing the same number of bytes at the same time. The
save measured is not the run's first, which also allocates the memory that later ones reuse. What is printed is the slowest
rank's time, the median of five rounds; `beyond it` is the largest peak of memory during a save, without the staged share.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from memory import forget_peak, resident

from dist_lm import loop, resume
from dist_lm.cli import resolve
from dist_lm.runtime.start import start

ROUNDS = 5
SIZE = {
    "model.layers": 14,
    "model.width": 768,
    "model.heads": 12,
    "data.seq_len": 64,
    "data.global_batch": 4,
}


def main(strategy: str) -> None:
    folder = Path(tempfile.gettempdir(), "dist_lm-benchmark-checkpoint")
    steps = [
        int(path.name[5:]) for path in folder.glob("step-*")
    ]  # a second start measures resuming instead
    settings = {
        **SIZE,
        "run.dir": str(folder),
        "run.trackers": [],
        "run.steps": 1000,
        "run.eval_every": 0,
        "run.save_every": 0,
        "run.stop_after": max(steps, default=0) + 1,
    }
    config = resolve(("benchmark", settings))
    runtime = start(config, strategy if strategy.startswith("zero") else None)
    place = resume.find_resume_point(runtime, config, [])
    assert place, f"{folder} is finished"
    run = resume.build(runtime, config, place)
    resume.describe(run)
    loop.train(run)
    if steps:  # a step's line is written before the checkpoint that follows it
        seconds = (folder / "metrics.jsonl").stat().st_mtime - psutil.Process().create_time()
        runtime.say(
            json.dumps(
                {
                    "strategy": runtime.strategy,
                    "first step after s, from the process's start": seconds,
                }
            )
        )
        runtime.close()
        return

    def slowest(seconds: float) -> float:
        return max(runtime.channel.gather(seconds))

    staged = run.saver.memory  # what this rank copied in the save just made
    source, stalls, copies, saves, disk, extra = (
        torch.empty_like(staged).fill_(1),
        [],
        [],
        [],
        [],
        [],
    )
    for n in range(ROUNDS):
        runtime.barrier()
        began = time.monotonic()
        staged.copy_(source)
        copies.append(slowest(time.monotonic() - began))
        run.state.step = 2 + n
        before = resident("VmRSS")
        forget_peak()
        runtime.barrier()
        began = time.monotonic()
        loop.save(run, last=False)
        stalls.append(slowest(time.monotonic() - began))
        run.saver.finish()
        saves.append(slowest(time.monotonic() - began))
        extra.append(slowest(resident("VmHWM") - before))
        runtime.barrier()
        began = time.monotonic()
        with open(folder / f"plain-{runtime.rank}", "wb") as file:
            file.write(staged.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        disk.append(slowest(time.monotonic() - began))
        os.unlink(folder / f"plain-{runtime.rank}")
    total = sum(runtime.channel.gather(staged.numel()))
    stall, copy, save, plain = map(statistics.median, (stalls, copies, saves, disk))
    runtime.say(
        json.dumps(
            {
                "strategy": runtime.strategy,
                "world": runtime.world_size,
                "checkpoint GB": round(total / 1e9, 3),
                "copy s": round(copy, 3),
                "stall s": round(stall, 3),
                "stall / copy": round(stall / copy, 2),
                "save s": round(save, 2),
                "plain write s": round(plain, 2),
                "save / plain write": round(save / plain, 2),
                "share staged MB": round(staged.numel() / 1e6),
                "beyond it MB": round(max(extra) / 1e6),
                "stalls": [round(s, 3) for s in stalls],
                "copies": [round(s, 3) for s in copies],
            }
        )
    )
    runtime.close()


if __name__ == "__main__":
    main(sys.argv[1])
