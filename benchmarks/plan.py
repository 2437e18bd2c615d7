"""What `python -m dist_lm.plan` says of a process's memory against what training really takes, on CPU.

    python benchmarks/plan.py ddp zero2      # target: within 10 % at both sizes, two processes each

Real training through train.py's own phases: three steps, then the checkpoint at their end. Measured is the largest
process's peak of resident memory in the steps, above that of one that trains a model of a few thousand parameters in the
same way and so has the same imports, libraries and threads; of the predictions the difference is taken alike.

MALLOC_MMAP_THRESHOLD_ makes glibc give freed memory back, so that resident is what is in use. The last column is without
it: what glibc keeps of freed memory comes on top and follows no rule that a plan could use.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dist_lm import loop, resume
from dist_lm.cli import resolve
from dist_lm.config import Config, ModelSpec
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.model import hf
from dist_lm.planning.memory import memory
from dist_lm.runtime import zero
from dist_lm.runtime.start import start
from dist_lm.runtime.strategy import choose_strategy
from dist_lm.size import vocabulary

STEPS, PROCESSES = 3, 2
SIZES = ("30 M", "100 M")
ENVIRONMENTS: tuple[dict[str, str], ...] = ({"MALLOC_MMAP_THRESHOLD_": str(2**20)}, {})
SHAPES = {
    "idle": (1, 32, 32),
    "15 M": (6, 384, 256),
    "30 M": (10, 512, 256),
    "100 M": (14, 768, 256),
}  # layers, width, tokens


def settings(strategy: str, size: str, folder: str) -> Config:
    layers, width, length = SHAPES[size]
    return resolve(
        (
            "benchmark",
            {
                "model.layers": layers,
                "model.heads": width // 32,
                "model.width": width,
                "data.input": f"{folder}/data",
                "data.tokenizer": "bpe:8192",
                "data.seq_len": length,
                "data.global_batch": 2 * PROCESSES,
                "run.dir": f"{folder}/{strategy}-{size}",
                "run.trackers": [],
                "run.eval_every": 0,
                "run.save_every": 0,
                "run.steps": STEPS,
                "run.resume": "never",
            },
        )
    )


def measure(strategy: str, size: str, folder: str) -> None:
    """One process of a training; rank 0 prints what the largest process took."""
    config, before_saving = settings(strategy, size, folder), []
    runtime = start(config, strategy)
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    place = resume.find_resume_point(runtime, config, [])
    assert place, f"{config.run.dir} is finished"
    run = resume.build(runtime, config, place)
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:  # building under ZeRO-3 has set others
        zero.tune_malloc(mmap_threshold=2**20, trim_threshold=2**17)
    save = loop.save

    def save_and_note(run: resume.Run, last: bool) -> None:
        before_saving.append(resident("VmHWM"))
        save(run, last)

    loop.save = save_and_note
    loop.train(run)
    taken = runtime.channel.gather([before_saving[0], resident("VmHWM")])
    if runtime.is_main:
        steps, whole = (max(figures) for figures in zip(*taken, strict=True))
        print(json.dumps({"peak in steps": steps, "peak with the checkpoint": whole}))
    runtime.close()


def resident(field: str) -> int:
    """Bytes: VmRSS is what is in memory now, VmHWM the most there was."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def main(strategies: list[str]) -> None:
    print(
        "| | parameters | predicted MB | measured MB | predicted / measured | measured with glibc's defaults |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="dist_lm-plan-") as folder:
        prepare(folder)
        for strategy in strategies:
            figures = {size: compare(strategy, size, folder) for size in ("idle", *SIZES)}
            for size, (parameters, *bytes_) in figures.items():
                if size != "idle":
                    own, idle = bytes_, figures["idle"][1:]
                    predicted, measured, default = (
                        (a - b) / 1e6 for a, b in zip(own, idle, strict=True)
                    )
                    print(
                        f"| {strategy} x {PROCESSES} | {parameters:,} | {predicted:.0f} | {measured:.0f} |"
                        f" {predicted / measured:.3f} | {default:.0f} |",
                        flush=True,
                    )


def prepare(folder: str) -> None:
    data = settings("ddp", "idle", folder).data.model_copy(update={"input": "stdlib"})
    prepare_dataset(data, f"{folder}/data", 2, say=lambda text: None)


def compare(
    strategy: str, size: str, folder: str, defaults: bool = True
) -> tuple[int, float, int, int]:
    """Parameters, predicted bytes, measured ones, and measured with glibc's defaults."""
    config = settings(strategy, size, folder)
    vocab_size = vocabulary(config)
    parameters = sum(
        math.prod(s)
        for s in hf.shapes(ModelSpec(config.model, vocab_size, config.data.seq_len)).values()
    )
    predicted = memory(config, choose_strategy(strategy), PROCESSES, vocab_size, on_gpu=False).peak
    measured = [started(strategy, size, folder, env) for env in ENVIRONMENTS[: 1 + defaults]]
    return parameters, predicted, measured[0], measured[-1]


def started(strategy: str, size: str, folder: str, env: dict[str, str]) -> int:
    shutil.rmtree(f"{folder}/{strategy}-{size}", ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(PROCESSES),
        __file__,
    ]
    done = subprocess.run(
        [*command, "--measure", strategy, size, folder],
        check=True,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    return int(json.loads(done.stdout.splitlines()[-1])["peak in steps"])


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(*sys.argv[2:])
    else:
        main(sys.argv[1:])
