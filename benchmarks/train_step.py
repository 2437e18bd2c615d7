"""A training step of train.py's loop against a bare PyTorch loop and against transformers' GPT2LMHeadModel.

All three train the same size on batches of the same shape, fp32, fused AdamW and clipping, one after another in rounds of
one run, so that the machine's moods fall on all alike. A figure is the median over all steps of all rounds but each
round's first five. train.py runs as it is, logging and reading ahead; the two others get ready-made batches.

    taskset -c 0 python benchmarks/train_step.py

One core, because two threads of one process on a machine that does anything else wait for each other at random.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dist_lm import loop
from dist_lm.cli import resolve
from dist_lm.config import Config, DataConfig, ModelSpec
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.outcome import Attempt
from dist_lm.resume import Run

SIZES = {  # layers, heads, width, seq_len, batch, steps a round
    "4 layers, 128 wide, T 256, batch 8, vocabulary 2048": (4, 4, 128, 256, 8, 25),
    "6 layers, 384 wide, T 256, batch 2, vocabulary 2048": (6, 6, 384, 256, 2, 25),
}
ROUNDS, WARM_UP, RATE = 3, 5, 1e-3


def median_step(times: list[float]) -> float:
    return statistics.median(np.diff(times[WARM_UP:]))


def loop_of(step: Callable[[], None], steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        step()
        times.append(time.monotonic())
    return times


def ours(config: Config) -> list[float]:
    """When each step's figures were read, in one run of train.py's main()."""
    times: list[float] = []
    record_step = loop.record_step

    def timed(run: Run, pending: loop.Pending) -> bool:
        times.append(time.monotonic())
        return record_step(run, pending)

    loop.record_step = timed
    try:
        loop.run_to_end(config, Attempt(Path(config.run.dir)))
    finally:
        loop.record_step = record_step
    return times


def plain_step(
    model: torch.nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor], batch: int, T: int
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    tokens = torch.randint(0, 2048, (64, batch, T + 1))
    number = iter(range(10**9))

    def step() -> None:
        loss = loss_of(tokens[next(number) % 64])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        prepare_dataset(DataConfig(), shards, 1, say=lambda text: None)
        for name, (layers, heads, width, T, batch, steps) in SIZES.items():
            figures: dict[str, list[float]] = {"train.py": [], "bare loop": [], "transformers": []}
            for number in range(ROUNDS):
                settings = {
                    "model.layers": layers,
                    "model.heads": heads,
                    "model.width": width,
                    "model.positions": "learned",
                    "model.norm": "layernorm",
                    "model.activation": "gelu_tanh",
                    "model.bias": True,
                    "data.input": str(shards),
                    "data.seq_len": T,
                    "data.global_batch": batch,
                    "optim.lr": RATE,
                    "run.dir": f"{folder}/{name}-{number}",
                    "run.steps": steps,
                    "run.eval_every": 0,
                    "run.save_every": 0,
                }
                config = resolve(("benchmark", settings))
                figures["train.py"].append(median_step(ours(config)))

                model = GPT(ModelSpec(config.model, 2048, T))
                init_weights(model, 1)

                def mean_loss(t: torch.Tensor, model: GPT = model) -> torch.Tensor:
                    return model(t[:, :-1], t[:, 1:]) / t[:, 1:].numel()

                step = plain_step(model, mean_loss, batch, T)
                figures["bare loop"].append(median_step(loop_of(step, steps)))

                theirs = GPT2LMHeadModel(
                    GPT2Config(
                        vocab_size=2048,
                        n_positions=T + 1,
                        n_embd=width,
                        n_layer=layers,
                        n_head=heads,
                        embd_pdrop=0,
                        resid_pdrop=0,
                        attn_pdrop=0,
                        use_cache=False,
                    )
                )
                # It shifts labels itself: T + 1 tokens in, T targets.
                step = plain_step(theirs, lambda t: theirs(t, labels=t).loss, batch, T)  # noqa: B023
                figures["transformers"].append(median_step(loop_of(step, steps)))
            print(name)
            best = {kind: statistics.median(values) for kind, values in figures.items()}
            for kind, seconds in best.items():
                ratios = [
                    own and other / own
                    for own, other in zip(figures["train.py"], figures[kind], strict=True)
                ]
                print(
                    f"  {kind:13} {1000 * seconds:8.2f} ms/step {batch * T / seconds:9.0f} tokens/s;"
                    f" speed of train.py relative to it {statistics.median(ratios):.3f}"
                    f" (rounds {min(ratios):.3f} to {max(ratios):.3f})"
                )


if __name__ == "__main__":
    main()
