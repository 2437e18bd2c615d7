"""Memory of building a large model under ZeRO-3, per process, above an idle process with the same imports.

    torchrun --nproc-per-node 4 benchmarks/memory.py configs/llama-1b.yaml      # target while building: ratio <= 1.3

The ratio is that of the peak to (this rank's share of the weights + the largest parameter). The optimizer's state is then
made (its fp32 pieces, two moments) and reported. Needs about 5 times the model's fp32 weights of memory in all.
"""

import json
import sys

from dist_lm.cli import read_yaml, resolve
from dist_lm.config import ModelSpec
from dist_lm.model.gpt import GPT
from dist_lm.model.init import parameter_shapes
from dist_lm.optim import make_optimizer
from dist_lm.runtime.start import start

VOCABULARY, CONTEXT = 32000, 128


def main(recipe: str) -> None:
    config = resolve(
        (recipe, read_yaml(recipe)), ("benchmark", {"run.trackers": [], "run.dir": "runs/memory"})
    )
    runtime = start(config, "zero3")
    import deepspeed  # noqa: F401  # the idle process has it too

    shapes = parameter_shapes(ModelSpec(config.model, VOCABULARY, CONTEXT))
    sizes = [4 * rows * (columns[0] if columns else 1) for rows, *columns in shapes.values()]
    allowed = sum(sizes) / runtime.world_size + max(sizes)
    idle = resident("VmRSS")
    forget_peak()
    with runtime.engine.construction():
        model = GPT(ModelSpec(config.model, VOCABULARY, CONTEXT))
    built = resident("VmHWM") - idle
    figures = runtime.channel.gather(built)
    runtime.say(
        json.dumps(
            {
                "parameters": sum(sizes) // 4,
                "processes": runtime.world_size,
                "share + largest MB": round(allowed / 1e6),
                "peak MB while building": [round(f / 1e6) for f in figures],
                "ratio": round(max(figures) / allowed, 2),
            }
        )
    )
    optimizer = make_optimizer(model, config.optim, config.run.precision)
    forget_peak()
    runtime.engine.prepare(model, optimizer, shapes, runtime.channel)
    figures = runtime.channel.gather([resident("VmHWM") - idle, resident("VmRSS") - idle])
    runtime.say(
        json.dumps(
            {
                "with optimizer state: peak MB": [round(f[0] / 1e6) for f in figures],
                "afterwards MB": [round(f[1] / 1e6) for f in figures],
                "weights, fp32 pieces and two moments MB": round(
                    4 * sum(sizes) / runtime.world_size / 1e6
                ),
            }
        )
    )
    runtime.close()


def resident(field: str) -> int:
    """Bytes: VmRSS is what is in memory now, VmHWM its peak since forget_peak()."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


if __name__ == "__main__":
    main(sys.argv[1])
