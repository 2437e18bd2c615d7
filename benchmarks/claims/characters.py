"""A whole run of configs/char.yaml, from the command to its end, against a loop that only trains.

train also prepares the text, evaluates, samples, saves and draws its curve.
"""

import re
import time

from benchmarks import corpus
from benchmarks.claim import COST, Claim, Context, Measured, Target, must_be_near, take_turns
from benchmarks.isolation import ROOT, run_processes
from dist_lm.metrics import read_metrics

_RECIPE = str(ROOT / "configs" / "char.yaml")


def measure(ctx: Context) -> Measured:
    steps = ctx.pick(200, 3)
    text = ctx.scratch / "text.txt"
    text.write_text("".join(corpus.documents(ctx.pick(1.2, 0.05))))
    number = iter(range(100))
    losses: dict[str, float] = {}

    def ours() -> float:
        folder = ctx.scratch / f"run-{next(number)}"
        words = ["dist_lm/train.py", "--config", _RECIPE, "--data.input", str(text)]
        words += ["--run.dir", str(folder), "--run.steps", str(steps)]
        words += ["--run.eval_every", str(max(steps // 2, 1))]
        began = time.perf_counter()
        run_processes(1, words, is_forked=ctx.is_quick)
        seconds = time.perf_counter() - began
        losses["ours"] = read_metrics(folder)[0][0]["loss"]
        return seconds

    def plain() -> float:
        words = ["benchmarks/plain_characters.py", str(text), _RECIPE, str(steps)]
        began = time.perf_counter()
        (output,) = run_processes(1, words, is_forked=ctx.is_quick)
        seconds = time.perf_counter() - began
        found = re.search(r"first loss (\S+)", output)
        assert found, output
        losses["plain"] = float(found[1])
        return seconds

    first = ours(), plain()
    # The same weights, and other windows of the text.
    equal = must_be_near(losses["ours"], losses["plain"], "first losses", within=0.05)
    if ctx.is_quick:
        return Measured([first[0]], [first[1]], equal)
    return take_turns(ctx, ours, plain, equal)


CLAIMS = (
    Claim(
        name="character-run",
        sentence="a whole run of configs/char.yaml (200 steps), against a loop that only trains",
        figure=COST,
        target=Target(most=1.1),
        measure=measure,
        rounds=1,
    ),
)
