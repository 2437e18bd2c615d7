"""A bare training script with Accelerate, up to its first step: what many projects begin with.

    python benchmarks/bare_accelerate.py TOKENS.npy LAYERS HEADS WIDTH VOCABULARY LENGTH BATCH

It imports nothing of dist_lm. It prints the loss and the clock at the end of its first step.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu.nano import PlainGPT


class Windows(Dataset):
    """Tokens of a memory map, cut into inputs and targets."""

    def __init__(self, path: str, length: int):
        self._tokens = np.load(path, mmap_mode="r")
        self._length = length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = number * self._length
        row = torch.from_numpy(self._tokens[first : first + self._length + 1].astype(np.int64))
        return row[:-1], row[1:]


def main(path: str, layers: int, heads: int, width: int, vocabulary: int, length: int, batch: int):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(1)
    model = PlainGPT(layers, heads, width, vocabulary, length)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rows = batch // accelerator.num_processes
    loader = DataLoader(Windows(path, length), batch_size=rows, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for tokens_BT, targets_BT in loader:
        loss = model(tokens_BT, targets_BT)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = accelerator.gather(loss.detach()[None]).mean().item()
        if accelerator.is_main_process:
            print(f"first step: loss {mean} at {time.time()}", flush=True)
        break
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
