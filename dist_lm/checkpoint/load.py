"""Reading checkpoints and transformers folders: network, weights, and what a run goes on from.

Only safetensors and JSON are read. Tensors are found by name over all files, so it does not matter
how they were divided among them.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_lm import families
from dist_lm.checkpoint.folder import locate, read_json
from dist_lm.checkpoint.layout import OwnedSlice
from dist_lm.config import ModelSpec
from dist_lm.console import warn
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import CheckpointError
from dist_lm.model import hf
from dist_lm.model.gpt import GPT

# From a tensor's name to a lazy slice of it. Raises KeyError where there is none.
_Getter = Callable[[str], Any]


def read_description(folder: Path) -> ModelSpec:
    """The network of a folder, from its config.json."""
    return families.from_config_json(read_json(folder / "config.json"))


def _layout(folder: Path, spec: ModelSpec) -> list[hf.Entry]:
    """Every tensor of a folder, as its config.json names them."""
    return hf.layout_in(spec, read_json(folder / "config.json").get("model_type"))


def tokenizer_hash(folder: Path) -> str | None:
    """Hash of the tokenizer that lies with a model, if one does."""
    if not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.load(folder).sha256


def read_weights(folder: Path, spec: ModelSpec, average: bool = False) -> dict[str, Tensor]:
    """The weights by our parameter names, on CPU; or the moving average that the run kept."""
    if not average:
        with _open_tensors(folder, ["model"]) as get:
            return hf.import_tensors(spec, get, _layout(folder, spec))
    with _open_tensors(folder, ["optimizer"]) as get:
        try:
            return hf.import_tensors(spec, get, hf.own_layout(spec, "ema"))
        except hf.MissingTensor as error:
            raise CheckpointError(
                f"{folder} holds no average of its weights; rule: trained with run.ema > 0"
            ) from error


def read_model(name: str, average: bool = False) -> tuple[GPT, Tokenizer, Path]:
    """A model ready to be used, its tokenizer, and the folder they came from; on CPU, in fp32."""
    folder = locate(name, warn)
    spec = read_description(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the model"
            f" {spec.vocab_size}; rule: no more",
        )
    weights = read_weights(folder, spec, average)  # first: it refuses sizes that no file has
    model = GPT(spec)
    model.load_state_dict(weights, assign=True)
    return model.eval(), tokenizer, folder


@torch.no_grad()
def restore(folder: Path, spec: ModelSpec, owned: Iterable[OwnedSlice], optimizer: bool) -> None:
    """Fill what this rank owns, reading little more of the files than that.

    With `optimizer` its tensors too. If the folder's context is longer than `spec.seq_len`, the
    part beyond is left out.
    """
    in_folder = replace(spec, seq_len=read_description(folder).seq_len)
    entries: dict[str, list[hf.Entry]] = {}
    for entry in _layout(folder, in_folder):
        entries.setdefault(entry.param, []).append(entry)
    shapes = hf.shapes(spec)
    stems = ["model", "optimizer"] if optimizer else ["model"]
    with _open_tensors(folder, stems) as get:
        for constant in entries.get("", []):
            hf.check_constant(constant, get, spec.config)
        for part in owned:
            for entry in entries[part.name]:
                hf.import_part(entry, get, part.weight, part.start)
            if optimizer:
                _restore_optimizer(folder, spec, part, shapes[part.name], get)


def _restore_optimizer(
    folder: Path, spec: ModelSpec, part: OwnedSlice, shape: tuple[int, ...], get: _Getter
) -> None:
    """Fill the optimizer's tensors for a slice."""
    name = ""
    try:
        for key, values in part.state.items():
            name = f"{part.name}.{key}"
            entry = hf.own_entry(part.name, shape, key)
            hf.import_part(entry, get, values, part.start)
        for key, values in part.extra.items():
            name = f"{part.name}.{key}"
            values.copy_(get(name)[...])
    except (KeyError, hf.MissingTensor):
        raise CheckpointError(
            f"{folder.name} lacks {name} of the optimizer; rule: resume with the same optimizer",
        ) from None


@contextlib.contextmanager
def _open_tensors(folder: Path, stems: list[str]) -> Iterator[_Getter]:
    """Inside, tensors of the files STEM*.safetensors can be read by name."""
    paths: list[Path] = []
    for stem in stems:
        paths += folder.glob(f"{stem}*.safetensors")
    file_of = {}
    with contextlib.ExitStack() as stack:
        for path in sorted(paths):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
            for name in file.keys():  # noqa: SIM118 — it is no mapping
                file_of[name] = file
        yield lambda name: file_of[name].get_slice(name)
