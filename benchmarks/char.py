"""nanoGPT's CPU run (configs/char.yaml) from one command line, against a plain PyTorch loop of the same size.

Whole processes, each on a core of its own at the same time; train.py also prepares the text, evaluates and saves, which
the plain loop does not.

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

    from dist_lm.config import read_yaml, resolve
    from dist_lm.model import GPT, init_weights

    torch.set_num_threads(1)
    text = Path(path).read_text()
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[c] for c in text])
    recipe = str(Path(__file__).parents[1] / "configs/char.yaml")
    model = GPT(resolve((recipe, read_yaml(recipe))).model, len(number), 64)
    init_weights(model, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - 65, (12,)).tolist()
        x, y = (torch.stack([tokens[s + shift : s + shift + 64] for s in starts]) for shift in (0, 1))
        (model(x, y) / y.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours = ["dist_lm/train.py", "--config", "configs/char.yaml", "--data.input", path, "--run.dir", folder]
        commands = {"train.py": ours, "plain loop": [__file__, path, "plain"]}
        began = time.monotonic()
        running = {
            name: subprocess.Popen(["taskset", "-c", str(core), sys.executable, *command], stdout=subprocess.DEVNULL)
            for core, (name, command) in enumerate(commands.items())
        }
        while running:
            for name in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(name).returncode
                print(f"{name}: {time.monotonic() - began:.1f} s, exit code {code}", flush=True)
            time.sleep(0.1)
        print((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])


if __name__ == "__main__":
    plain(sys.argv[1]) if sys.argv[2:] == ["plain"] else main(sys.argv[1])
