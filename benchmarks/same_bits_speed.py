"""How long a step of train.py takes on both sides of same_bits.py, at the quickstart's size."""

import json
import statistics
from pathlib import Path

from same_bits_sides import Done, Side
from tqdm import tqdm

STEPS, WARM_UP = 60, 10  # of each run, and those at its start that do not count
WORLDS = {"1 process": 1, "ddp x 2": 2}


def compare(base: Side, new: Side, rounds: int) -> None:
    """Both sides in turns, round after round, and the ratio of their medians."""
    prepare_text(base)
    steps: dict[tuple[str, str], list[float]] = {}  # the median step of each round
    with tqdm(total=rounds * len(WORLDS) * 2, leave=False, disable=None) as bar:
        for number in range(rounds):
            for name, world in WORLDS.items():
                for side in (base, new):
                    median = median_step(side, side.work / f"{name}-{number}", world)
                    steps.setdefault((name, side.name), []).append(median)
                    bar.update()
                old, now = steps[name, "base"][-1], steps[name, "new"][-1]
                tqdm.write(
                    f"round {number + 1}, {name}: base {1000 * old:.1f} ms, new {1000 * now:.1f} ms,"
                    f" new / base {now / old:.3f}"
                )
    for name in WORLDS:
        old, now = steps[name, "base"], steps[name, "new"]
        ratios = [b / a for a, b in zip(old, now, strict=True)]
        before, after = statistics.median(old), statistics.median(now)
        print(
            f"{name}: a step takes {1000 * before:.1f} ms on the base, {1000 * after:.1f} ms now;"
            f" ratio of the medians {after / before:.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f})"
        )


def prepare_text(base: Side) -> None:
    """The quickstart's text, prepared once by the base for all runs."""
    shards = base.inputs / "quickstart"
    if not (shards / "dataset.json").exists():
        print("preparing the quickstart's text", flush=True)
        check(base.run("-m", "dist_lm.prepare", "--output", str(shards)))


def median_step(side: Side, run: Path, world: int) -> float:
    """Seconds of a step in a run of train.py's defaults that only trains."""
    words = ["--data.input", str(side.inputs / "quickstart"), "--run.dir", str(run)]
    words += ["--run.steps", str(STEPS), "--run.eval_every", "0", "--run.save_every", "0"]
    check(side.run("dist_lm/train.py", *words, "--run.trackers", world=world))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    seconds = []
    before = 0
    for entry in map(json.loads, lines):
        seconds.append((entry["tokens"] - before) / entry["tokens_per_second"])
        before = entry["tokens"]
    return statistics.median(seconds[WARM_UP:])


def check(done: Done) -> None:
    if done.code:
        raise SystemExit(f"error: exit code {done.code}: {done.last_line}")
