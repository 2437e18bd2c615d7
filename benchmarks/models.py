"""Models that claims compare: the same sizes and the same weights on both sides.

Shapes: B rows, T tokens, V vocabulary.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_lm import families
from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.model import hf
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights


@dataclass(frozen=True)
class Size:
    """A GPT-2 of some size, and the rows that it is trained on at once."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    length: int
    batch: int

    def config(self) -> ModelConfig:
        return ModelConfig(
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            positions="learned",
            norm="layernorm",
            activation="gelu_tanh",
            bias=True,
        )

    def spec(self) -> ModelSpec:
        return ModelSpec(self.config(), self.vocabulary, self.length)

    def settings(self) -> dict[str, Any]:
        """The same as settings of a run."""
        return {
            "model.layers": self.layers,
            "model.heads": self.heads,
            "model.width": self.width,
            "model.positions": "learned",
            "model.norm": "layernorm",
            "model.activation": "gelu_tanh",
            "model.bias": True,
            "data.seq_len": self.length,
            "data.global_batch": self.batch,
        }

    def tokens(self, number: int = 8) -> list[Tensor]:
        """Random batches of T + 1 tokens."""
        generator = torch.Generator().manual_seed(11)
        shape = (number, self.batch, self.length + 1)
        return list(torch.randint(self.vocabulary, shape, generator=generator))


TINY = Size(layers=1, heads=2, width=32, vocabulary=64, length=16, batch=2)


def ours(size: Size) -> GPT:
    model = GPT(size.spec())
    init_weights(model, seed=1)
    return model


def transformers_twin(model: GPT, folder: Path) -> Any:
    """transformers' model with the same weights."""
    from transformers import AutoModelForCausalLM  # slow

    write_folder(folder, model)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def write_folder(folder: Path, model: GPT) -> None:
    """The model as transformers reads it."""
    folder.mkdir(exist_ok=True)
    weights = model.state_dict()
    tensors = {}
    for entry in hf.layout(model.spec):
        if entry.param:
            part = weights[entry.param].flatten()[slice(*entry.span)]
            tensors[entry.name] = entry.from_flat(part).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = families.config_json(model.spec, eot_id=None)
    (folder / "config.json").write_text(json.dumps(config))


def nanogpt_twin(model: GPT, size: Size, checkout: Path) -> Any:
    """nanoGPT's model of the same size with the same weights."""
    found = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=size.length,
        vocab_size=size.vocabulary,
        n_layer=size.layers,
        n_head=size.heads,
        n_embd=size.width,
        dropout=0.0,
        bias=True,
    )
    twin = module.GPT(config)
    weights = twin.state_dict()
    own = model.state_dict()
    for entry in hf.layout(model.spec):
        if entry.param and entry.name in weights:
            value = entry.from_flat(own[entry.param].flatten()[slice(*entry.span)])
            # transformers stores these four matrices the other way round, nanoGPT does not.
            if entry.name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                value = value.t()
            weights[entry.name].copy_(value)
    return twin
