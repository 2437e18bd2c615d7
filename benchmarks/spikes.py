"""How often the rule of run.on_spike raises an alarm on curves of runs, and its cost for a step.

    python benchmarks/spikes.py RUN [RUN ...]

Prints for each run its steps, the alarms, and the time of one judgement.
"""

import sys
import time

from dist_lm.metrics import read_metrics
from dist_lm.spikes import WINDOW, far_off


def main(runs: list[str]) -> None:
    total_steps = 0
    total_alarms = 0
    for run in runs:
        steps, _ = read_metrics(run)
        figures = [[step["loss"], step["grad_norm"]] for step in steps]
        began = time.perf_counter()
        alarms = alarms_of(figures)
        microseconds = 1e6 * (time.perf_counter() - began) / len(figures)
        print(f"{run}: {len(figures):,} steps, {len(alarms)} alarms, {microseconds:.0f} us each")
        for alarm in alarms:
            print(f"    {alarm}")
        total_steps += len(figures)
        total_alarms += len(alarms)
    print(f"{total_steps:,} steps, {total_alarms} alarms")


def alarms_of(figures: list[list[float]]) -> list[str]:
    """What a run with run.on_spike=warn would have said, a line for each step."""
    alarms = []
    for number, (loss, norm) in enumerate(figures):
        recent = figures[max(0, number - WINDOW) : number]
        reason = far_off(recent, loss, norm)
        if reason:
            alarms.append(f"step {number + 1}: {reason}")
    return alarms


if __name__ == "__main__":
    main(sys.argv[1:])
