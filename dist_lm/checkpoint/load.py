"""checkpoint.load."""

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_lm.checkpoint.folder import locate, read_json
from dist_lm.checkpoint.save import OwnedSlice
from dist_lm.config import ModelSpec
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import CheckpointError
from dist_lm.model import hf
from dist_lm.model.gpt import GPT


def read_description(folder: Path) -> ModelSpec:
    """The network of a folder, from its config.json."""
    return hf.from_config_json(read_json(folder / "config.json"))


def tokenizer_hash(folder: Path) -> str | None:
    """Hash of the tokenizer that lies with a model, if one does."""
    return Tokenizer.load(folder).sha256 if (folder / "tokenizer.json").is_file() else None


def read_weights(folder: Path, spec: ModelSpec, average: bool = False) -> dict[str, Tensor]:
    """The weights by our parameter names, on CPU; or the moving average of them that the run kept beside."""
    with _open_tensors(folder, "optimizer" if average else "model") as get:
        if not average:
            return hf.import_tensors(spec, get)
        try:
            return hf.import_tensors(spec, get, hf.own_layout(spec, "ema"))
        except hf.MissingTensor as error:
            raise CheckpointError(
                f"{folder} holds no average of its weights; rule: trained with run.ema > 0"
            ) from error


def read_model(name: str, average: bool = False) -> tuple[GPT, Tokenizer, Path]:
    """A model ready to be used, its tokenizer, and the folder they came from; on CPU, in fp32."""
    folder = locate(name, lambda text: print(text, file=sys.stderr))
    spec = read_description(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the model {spec.vocab_size}; rule: no more",
        )
    model = GPT(spec)
    model.load_state_dict(read_weights(folder, spec, average), assign=True)
    return model.eval(), tokenizer, folder


@torch.no_grad()
def restore(
    folder: Path,
    spec: ModelSpec,
    owned: Iterable[OwnedSlice],
    optimizer: bool,
) -> None:
    """Fill what this rank holds, reading little more of the files than that; with the optimizer's tensors or without.

    What a longer context of the folder has beyond `seq_len` is left out.
    """
    model, context = spec.config, read_description(folder).seq_len
    entries: dict[str, list[hf.Entry]] = {}
    for entry in hf.layout(replace(spec, seq_len=context)):
        entries.setdefault(entry.param, []).append(entry)
    shapes = hf.shapes(spec)
    with _open_tensors(folder, *(("model", "optimizer") if optimizer else ("model",))) as get:
        for constant in entries.get("", ()):
            hf.import_part(constant, get, None, 0, model)
        for h in owned:
            for entry in entries[h.name]:
                hf.import_part(entry, get, h.weight, h.start, model)
            for key, values in {**h.state, **h.extra}.items() if optimizer else ():
                name = f"{h.name}.{key}"
                try:
                    if key in h.state:
                        hf.import_part(
                            hf.own_entry(h.name, shapes[h.name], key), get, values, h.start, model
                        )
                    else:
                        values.copy_(get(name)[...])
                except (KeyError, hf.MissingTensor):
                    raise CheckpointError(
                        f"{folder.name} lacks {name} of the optimizer; rule: resume with the same optimizer",
                    ) from None


@contextlib.contextmanager
def _open_tensors(folder: Path, *stems: str) -> Any:
    """A function from tensor name to tensor over the safetensors files whose names begin so."""
    with contextlib.ExitStack() as stack:
        where = {}
        for path in sorted(path for stem in stems for path in folder.glob(f"{stem}*.safetensors")):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
            where.update(dict.fromkeys(file.keys(), file))
        yield lambda name: where[name].get_slice(name)  # KeyError where there is none
