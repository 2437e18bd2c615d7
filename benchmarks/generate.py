"""Greedy generation with a KV cache, batch 1, a 124M-size model: dist_lm against transformers, side by side.

    python benchmarks/generate.py            # target: ratio >= 1.15, the same ids

Both take turns on the same weights and the same prompt, so that what else the machine does hits both; the ratio is that
of the medians. The weights are random: what is generated does not matter, that it is the same does.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dist_lm import families
from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.model import hf
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.sample import Sampling, lay_out_for_decoding, sample

VOCAB_SIZE, SEQ_LEN, PROMPT = 50257, 1024, 32
GPT2 = ModelConfig(
    layers=12,
    heads=12,
    width=768,
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    bias=True,
)
LLAMA = ModelConfig(layers=12, heads=12, width=768)


def ours(model: GPT, tokenizer: Tokenizer, prompt: list[int], new_tokens: int) -> list[int]:
    settings = Sampling(new_tokens, temperature=0)
    *_, (made,) = sample(model, tokenizer, [prompt], settings, seeds=[0], stop_early=False)
    return made.tokens


def theirs(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    prompt_BT = torch.tensor([prompt])
    made_BT = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return made_BT[0, len(prompt) :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    config = GPT2 if args.family == "gpt2" else LLAMA
    model = GPT(ModelSpec(config, VOCAB_SIZE, SEQ_LEN)).eval()
    init_weights(model, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(folder, model)
        peer = AutoModelForCausalLM.from_pretrained(folder).eval()
    lay_out_for_decoding(model)  # as generate.py does on a CPU
    tokenizer = train_tokenizer("byte", [])
    prompt = torch.randint(
        VOCAB_SIZE, (PROMPT,), generator=torch.Generator().manual_seed(1)
    ).tolist()

    runs: dict[str, Callable[[], list[int]]] = {
        "dist_lm": lambda: ours(model, tokenizer, prompt, args.new_tokens),
        "transformers": lambda: theirs(peer, prompt, args.new_tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.rounds + 1):  # the first warms up
        made = {}
        for name, run in runs.items():
            start = time.perf_counter()
            made[name] = run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
        assert made["dist_lm"] == made["transformers"], f"different ids: {made}"
    rates = {name: args.new_tokens / statistics.median(values) for name, values in seconds.items()}
    for name, rate in rates.items():
        print(
            f"{name:14} {rate:7.2f} tokens/s   ({args.family}, {args.threads} threads, median of {args.rounds})"
        )
    print(f"ratio {rates['dist_lm'] / rates['transformers']:.3f}, same ids")


def write_folder(folder: str, model: GPT) -> None:
    """The model as transformers reads it."""
    weights = model.state_dict()
    tensors = {
        entry.name: entry.from_flat(weights[entry.param].flatten()[slice(*entry.span)])
        for entry in hf.layout(model.spec)
    }
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    Path(folder, "config.json").write_text(
        json.dumps(families.config_json(model.spec, eot_id=None))
    )


if __name__ == "__main__":
    main()
