"""The loop of teaching code around our model: characters, random windows, AdamW, clipping.

    python benchmarks/plain_characters.py TEXT RECIPE STEPS

It only trains: it neither saves, evaluates nor draws.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dist_lm.cli import read_yaml, resolve
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights


def main(path: str, recipe: str, steps: int) -> None:
    torch.set_num_threads(1)
    text = Path(path).read_text()
    number = {character: n for n, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text])
    config = resolve((recipe, read_yaml(recipe)))
    length = config.data.seq_len
    batch = config.data.global_batch
    model = GPT(config.model_spec(len(number) + 2))  # ours also has end of text and unknown
    init_weights(model, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(steps):
        starts = torch.randint(len(tokens) - length - 1, (batch,)).tolist()
        x = torch.stack([tokens[start : start + length] for start in starts])
        y = torch.stack([tokens[start + 1 : start + length + 1] for start in starts])
        loss = model(x, y) / y.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            print(f"first loss {loss.item()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
