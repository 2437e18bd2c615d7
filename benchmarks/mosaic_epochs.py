"""Shuffled epochs of mosaicml-streaming over stored sequences, for the claim `loader-mosaic`.

    python benchmarks/mosaic_epochs.py SEQUENCES.npy FOLDER BATCH EPOCHS

It writes the sequences to its own format first, reads one epoch that does not count, and prints the
seconds of the others and the sum of all tokens of one.
"""

import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader


class Tokens(StreamingDataset):
    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(super().__getitem__(number)["tokens"].astype(np.int64))


def main(path: str, folder: str, batch: int, epochs: int) -> None:
    torch.set_num_threads(1)
    table = np.load(path, mmap_mode="r")
    columns = {"tokens": f"ndarray:uint16:{table.shape[1]}"}
    with MDSWriter(out=folder, columns=columns) as writer:
        for row in table:
            writer.write({"tokens": row})
    data = Tokens(local=folder, shuffle=True, batch_size=batch)
    loader = DataLoader(data, batch_size=batch)

    def epoch() -> Iterator[torch.Tensor]:
        for rows in loader:
            inputs = rows[:, :-1].contiguous()
            yield inputs
            rows[:, 1:].contiguous()

    total = sum(int(inputs.sum()) for inputs in epoch())
    began = time.process_time()
    for _ in range(epochs):
        for _ in epoch():
            pass
    print(f"seconds {time.process_time() - began} sum {total}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
