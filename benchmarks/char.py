"""nanoGPT's CPU run (configs/char.yaml) from one command line, against a plain PyTorch loop of the same size.

Whole processes, each on a core of its own at the same time. train.py also prepares the text, saves every 200 steps,
evaluates and samples every 250 (or, in the second pair, does not), and draws its curve; the plain loop only trains.

    python benchmarks/char.py TEXT_FILE
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 2000


def plain(path: str) -> None:
    """The loop of teaching code: characters, random windows, mean loss, AdamW, clipping."""
    import torch

    from dist_lm.cli import read_yaml, resolve
    from dist_lm.config import ModelSpec
    from dist_lm.model.gpt import GPT
    from dist_lm.model.init import init_weights

    torch.set_num_threads(1)
    text = Path(path).read_text()
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[c] for c in text])
    recipe = str(Path(__file__).parents[1] / "configs/char.yaml")
    model = GPT(ModelSpec(resolve((recipe, read_yaml(recipe))).model, len(number), 64))
    init_weights(model, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - 65, (12,)).tolist()
        x, y = (
            torch.stack([tokens[s + shift : s + shift + 64] for s in starts]) for shift in (0, 1)
        )
        (model(x, y) / y.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main(path: str) -> None:
    for extra in ([], ["--run.eval_every", "0"]):
        for cores in ((0, 1), (1, 0)):  # they are not equally fast
            seconds = race(path, extra, cores)
            ratio = seconds["train.py"] / seconds["plain loop"]
            said = ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items())
            print(
                f"{' '.join(extra) or 'as it stands'}, cores {cores}: {said}: {ratio:.3f} x",
                flush=True,
            )


def race(path: str, extra: list[str], cores: tuple[int, int]) -> dict[str, float]:
    """Seconds that each of both processes lived, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        ours = [
            "dist_lm/train.py",
            "--config",
            "configs/char.yaml",
            "--data.input",
            path,
            "--run.dir",
            folder,
            *extra,
        ]
        commands = {"train.py": ours, "plain loop": [__file__, path, "plain"]}
        began, seconds = time.monotonic(), {}
        running = {
            name: subprocess.Popen(
                ["taskset", "-c", str(core), sys.executable, *command], stdout=subprocess.DEVNULL
            )
            for core, (name, command) in zip(cores, commands.items(), strict=True)
        }
        while len(seconds) < len(running):
            for name, process in running.items():
                if name not in seconds and process.poll() is not None:
                    assert process.returncode == 0, f"{name}: exit code {process.returncode}"
                    seconds[name] = time.monotonic() - began
            time.sleep(0.05)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        # The validation loss, if it evaluated.
        print([line for line in lines if '"event"' not in line][-1])
    return seconds


if __name__ == "__main__":
    plain(sys.argv[1]) if sys.argv[2:] == ["plain"] else main(sys.argv[1])
