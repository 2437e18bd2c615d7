"""How long a step of train.py takes on both sides of same_bits.py, at the quickstart's size."""

import json
import statistics
import sys
from pathlib import Path

from same_bits_sides import Done, Side
from tqdm import tqdm

STEPS, WARM_UP = 60, 10  # of each run, and those at its start that do not count
WORLDS = {"1 process": 1, "ddp x 2": 2}


def compare(base: Side, new: Side, rounds: int) -> None:
    """Both sides in turns, round after round, and the ratio of their medians."""
    prepare_text(base)
    medians: dict[tuple[str, str], list[float]] = {}  # the median step of each round
    with tqdm(total=rounds * len(WORLDS) * 2, leave=False, disable=None) as bar:
        for number in range(rounds):
            for name, world in WORLDS.items():
                for side in (base, new):
                    seconds = median_step(side, side.work / f"{name}-{number}", world)
                    medians.setdefault((name, side.name), []).append(seconds)
                    bar.update()
                before = medians[name, "base"][-1]
                after = medians[name, "new"][-1]
                tqdm.write(
                    f"round {number + 1}, {name}: base {1000 * before:.1f} ms,"
                    f" new {1000 * after:.1f} ms, new / base {after / before:.3f}"
                )
                sys.stdout.flush()
    for name in WORLDS:
        print(summary(name, medians[name, "base"], medians[name, "new"]))


def summary(name: str, base: list[float], new: list[float]) -> str:
    ratios = [after / before for before, after in zip(base, new, strict=True)]
    before = statistics.median(base)
    after = statistics.median(new)
    return (
        f"{name}: a step takes {1000 * before:.1f} ms on the base, {1000 * after:.1f} ms now;"
        " ratio of"
        f" the medians {after / before:.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f})"
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
    seconds: list[float] = []
    before = 0
    for entry in map(json.loads, lines):
        if "event" in entry:
            continue
        seconds.append((entry["tokens"] - before) / entry["tokens_per_second"])
        before = entry["tokens"]
    return statistics.median(seconds[WARM_UP:])


def check(done: Done) -> None:
    if done.code:
        raise SystemExit(f"error: exit code {done.code}: {done.last_line}")
