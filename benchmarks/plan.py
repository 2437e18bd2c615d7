"""What `python -m dist_lm.plan` says of a process's memory against what training really takes, on CPU.

    python benchmarks/plan.py ddp zero2      # target: within 10 % at both sizes, with two processes each

Real training through train.py's own phases: three steps and the checkpoint at their end. Measured is the peak of a
process's resident memory above that of one that trains a model of a few thousand parameters in the same way, which so has
the same imports, libraries and threads.
"""

import json
import subprocess
import sys
import tempfile

from dist_lm import train
from dist_lm.config import Config, resolve
from dist_lm.data import prepare_dataset
from dist_lm.runtime import start

STEPS, PROCESSES = 3, 2
SHAPES = {"idle": (1, 32, 32), "30 M": (10, 512, 256), "100 M": (14, 768, 256)}  # layers, width, tokens


def settings(strategy: str, size: str, folder: str) -> Config:
    layers, width, length = SHAPES[size]
    return resolve(("benchmark", {
        "model.layers": layers, "model.heads": width // 32, "model.width": width, "data.input": f"{folder}/data",
        "data.tokenizer": "bpe:8192", "data.seq_len": length, "data.global_batch": 2 * PROCESSES,
        "run.dir": f"{folder}/{strategy}-{size}", "run.trackers": [], "run.eval_every": 0, "run.save_every": 0,
        "run.steps": STEPS, "run.resume": "never",
    }))  # fmt: skip


def measure(strategy: str, size: str, folder: str) -> None:
    """One process of a training; rank 0 prints what the largest one took: in its steps, and with the checkpoint."""
    config, before_saving = settings(strategy, size, folder), []
    runtime = start(config, strategy)
    idle = resident("VmRSS")
    run = train.build(runtime, config)
    built = resident("VmRSS")
    train.resume(run, [])
    save = train.save

    def save_measured(run: train.Run, last: bool) -> None:
        before_saving.append(resident("VmHWM"))
        save(run, last)

    train.save = save_measured
    train.train(run)
    took = [idle, built, before_saving[0], resident("VmRSS"), resident("VmHWM")]
    largest = [max(figures) for figures in zip(*runtime.channel.gather(took), strict=True)]
    if runtime.is_main:
        print(json.dumps(largest))
    runtime.close()


def resident(field: str) -> int:
    """Bytes: VmRSS is what is in memory now, VmHWM the most there was."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def main(strategies: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="dist_lm-plan-") as folder:
        prepare_dataset(
            settings("ddp", "idle", folder).data.model_copy(update={"input": "stdlib"}), f"{folder}/data", 2
        )
        for strategy in strategies:
            for size in SHAPES:
                print(strategy, size, started(strategy, size, folder))


def started(strategy: str, size: str, folder: str) -> list[int]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), __file__]
    done = subprocess.run(
        [*command, "--measure", strategy, size, folder], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(*sys.argv[2:])
    else:
        main(sys.argv[1:])
