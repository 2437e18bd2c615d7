"""Tokens/s of `sbatch slurm/train.sh` on two nodes against `launch/torchrun.sh --nproc 2` on one, the same run.

    python benchmarks/launching.py [ROUNDS]

As root: two network namespaces on this machine are the nodes, with one core each (tests/machines.py). Needs two cores.
Rounds alternate, and the median step of each run is taken without its first five.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from dist_lm.metrics import read_metrics
from tests.machines import Slurm, admin_env, slurm
from tests.procs import ROOT

STEPS = 30
TRAIN = (
    f"--run.steps {STEPS} --run.eval_every 0 --run.save_every 0 --run.trackers".split()
)  # the quickstart's model


def tokens_per_second(run: Path) -> float:
    steps = read_metrics(run)[0]
    assert len(steps) == STEPS, run
    return statistics.median(step["tokens_per_second"] for step in steps[5:])


def one_node(run: Path) -> float:
    command = [f"{ROOT}/launch/torchrun.sh", "--nproc", "2", "--run.dir", str(run), *TRAIN]
    subprocess.run(command, check=True, env=admin_env(PYTHON=sys.executable), capture_output=True)
    return tokens_per_second(run)


def two_nodes(cluster: Slurm, run: Path) -> float:
    job = cluster.submit("--nodes=2", "slurm/train.sh", "--run.dir", str(run), *TRAIN)
    assert cluster.wait(job, 600) == "COMPLETED", cluster.said(job)
    return tokens_per_second(run)


def main(rounds: int, folder: Path) -> None:
    prepare = [
        sys.executable,
        "-m",
        "dist_lm.prepare",
        "--input",
        "stdlib",
        "--output",
        str(folder / "data"),
    ]
    subprocess.run(prepare, check=True, capture_output=True)
    TRAIN.extend(["--data.input", str(folder / "data")])
    with slurm(folder / "slurm") as cluster:
        ratios = []
        for number in range(rounds):
            one, two = (
                one_node(folder / f"one{number}"),
                two_nodes(cluster, folder / f"two{number}"),
            )
            ratios.append(two / one)
            print(
                f"one node {one:,.0f} tokens/s, two nodes {two:,.0f}: {two / one:.3f}", flush=True
            )
    print(f"median of {rounds}: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, Path(folder))
