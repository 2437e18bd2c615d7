"""Our parameter names <-> transformers' layouts (GPT-2, Llama, Qwen3, openai-gpt).

A layout is data: a list of entries, each of which says which rows of which parameter a tensor of
the file holds. Reading and writing, whole or in slices, follow this table. What a family has and
our model lacks is written where a constant says exactly the same: absent biases and positions as
zeros, sinusoidal positions as their table. transformers is not imported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.errors import CheckpointError
from dist_lm.families import OWN_TYPE, family
from dist_lm.model.init import parameter_shapes, unpadded
from dist_lm.model.positions import sinusoid

FLOATS = ("F32", "BF16", "F16", "F64")  # types of weights, as safetensors names them


class MissingTensor(CheckpointError):
    """A file lacks a tensor that its config implies."""


@dataclass(frozen=True)
class Naming:
    """How a family names its tensors, beside our names, both without ".weight" and ".bias"."""

    first: dict[str, str]
    blocks: str  # tensors of block i begin with "{blocks}.{i}."
    block: dict[str, str]  # names inside a block
    last: dict[str, str]


GPT2_BLOCK = {
    "ln_1": "norm1",
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.out",
    "ln_2": "norm2",
    "mlp.c_fc": "ffn.up",
    "mlp.c_proj": "ffn.down",
}
LLAMA_BLOCK = {
    "input_layernorm": "norm1",
    "self_attn.q_proj": "attn.qkv",
    "self_attn.k_proj": "attn.qkv",
    "self_attn.v_proj": "attn.qkv",
    "self_attn.o_proj": "attn.out",
    "post_attention_layernorm": "norm2",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}
QWEN3_BLOCK = {
    **LLAMA_BLOCK,
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
}
ROPE_FAMILIES = ("llama", "qwen3")  # our network has all that these have
NAMINGS = {
    "gpt2": Naming(
        first={"transformer.wte": "embed", "transformer.wpe": "positions"},
        blocks="transformer.h",
        block=GPT2_BLOCK,
        last={"transformer.ln_f": "norm", "lm_head": "head"},
    ),
    "openai-gpt": Naming(
        first={"transformer.tokens_embed": "embed", "transformer.positions_embed": "positions"},
        blocks="transformer.h",
        block=GPT2_BLOCK,
        last={"lm_head": "head"},
    ),
    "llama": Naming(
        first={"model.embed_tokens": "embed"},
        blocks="model.layers",
        block=LLAMA_BLOCK,
        last={"model.norm": "norm", "lm_head": "head"},
    ),
    "qwen3": Naming(
        first={"model.embed_tokens": "embed"},
        blocks="model.layers",
        block=QWEN3_BLOCK,
        last={"model.norm": "norm", "lm_head": "head"},
    ),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: rows of a parameter, rows of an optimizer's tensor, or a constant."""

    name: str
    shape: tuple[int, ...]
    param: str = ""  # our name of the parameter; empty for a constant
    rows: tuple[int, int] = (0, 0)  # [start, stop) of the parameter, before transposing
    transpose: bool = False
    constant: str = ""  # "zeros" or "sinusoid"
    key: str = ""  # of the optimizer's tensor; empty for the weight itself

    @property
    def bytes(self) -> int:
        return 4 * math.prod(self.shape)  # fp32

    @property
    def span(self) -> tuple[int, int]:
        """Which elements of the flattened parameter these rows are."""
        start, stop = self.rows
        columns = math.prod(self.shape) // (stop - start)
        return start * columns, stop * columns

    def from_flat(self, flat: Tensor) -> Tensor:
        """The tensor of the file, from those elements: fp32, contiguous."""
        if self.transpose:
            return flat.view(self.shape[::-1]).T.float().contiguous()
        return flat.view(self.shape).float().contiguous()


# --- tensors: what a file holds


@cache
def layout(spec: ModelSpec) -> list[Entry]:
    """Every tensor of a saved model, in file order; our own names where no family fits.

    The list is shared by all callers, so it must not be changed.
    """
    kind = family(spec.config)
    if kind is None:
        return own_layout(spec)
    return _layout_of(spec, kind)


def layout_in(spec: ModelSpec, model_type: object) -> list[Entry]:
    """Every tensor of a folder whose config.json has this model_type.

    A model may have come into a family since: earlier versions wrote `qk_norm` under our own names.
    """
    if model_type == OWN_TYPE:
        return own_layout(spec)
    return layout(spec)


def _layout_of(spec: ModelSpec, kind: str) -> list[Entry]:
    """Every tensor, as a family has it."""
    ours = shapes(spec)
    of_family = _shapes_of_family(spec, kind)
    entries = []
    for name, param in _names(spec.config, kind):
        if param not in of_family:
            continue
        rows = _rows(spec.config, name, of_family[param][0])
        shape = (rows[1] - rows[0], *of_family[param][1:])
        # GPT-2 and openai-gpt store the matrices of their blocks as (inputs, outputs).
        transpose = kind not in ROPE_FAMILIES and ".c_" in name and len(shape) == 2
        if transpose:
            shape = shape[::-1]
        if param in ours:
            entries.append(Entry(name, shape, param, rows, transpose))
        else:
            entries.append(Entry(name, shape, constant=_constant_for(param, spec.config)))
    return entries


def own_layout(spec: ModelSpec, key: str = "") -> list[Entry]:
    """Each of our parameters as it is, or the optimizer's tensor `key` of it."""
    return [own_entry(name, shape, key) for name, shape in shapes(spec).items()]


def own_entry(param: str, shape: tuple[int, ...], key: str = "") -> Entry:
    """A parameter under our own name, or the optimizer's tensor `key` of it."""
    name = f"{param}.{key}" if key else param
    return Entry(name, shape, param, rows=(0, shape[0]), key=key)


@cache
def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters, the vocabulary unpadded.

    The dict is shared by all callers, so it must not be changed.
    """
    padded = parameter_shapes(spec)
    return {name: unpadded(name, shape, spec.vocab_size) for name, shape in padded.items()}


def number_of_parameters(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in shapes(spec).values())


def _shapes_of_family(spec: ModelSpec, kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all that the family has. What our model lacks of it is written as a constant."""
    if kind in ROPE_FAMILIES:
        return shapes(spec)
    with_all = spec.config.model_copy(update={"bias": True, "positions": "learned"})
    return shapes(replace(spec, config=with_all))


def _names(model: ModelConfig, kind: str) -> list[tuple[str, str]]:
    """(name in the file, our parameter), of all that a family may have."""
    naming = NAMINGS[kind]
    modules = list(naming.first.items())
    for i in range(model.layers):
        for in_file, ours in naming.block.items():
            modules.append((f"{naming.blocks}.{i}.{in_file}", f"blocks.{i}.{ours}"))
    modules += naming.last.items()
    names = []
    for in_file, ours in modules:
        names.append((f"{in_file}.weight", f"{ours}.weight"))
        names.append((f"{in_file}.bias", f"{ours}.bias"))
    return names


def _rows(model: ModelConfig, name: str, rows: int) -> tuple[int, int]:
    """The rows of our parameter that a tensor holds: Llama's queries, keys and values are apart."""
    q = model.width
    kv = model.kv_heads * (model.width // model.heads)
    parts = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
    module = name.split(".")[-2]
    return parts.get(module, (0, rows))


def _constant_for(param: str, model: ModelConfig) -> str:
    """Which constant says the same as a parameter that our model lacks."""
    if param == "positions.weight" and model.positions == "sinusoidal":
        return "sinusoid"
    return "zeros"


def constant(entry: Entry) -> Tensor:
    """The values of an entry that no parameter of ours stands for."""
    if entry.constant == "sinusoid":
        return sinusoid(*entry.shape)
    return torch.zeros(entry.shape)


# --- tensors: reading a file


def import_tensors(
    spec: ModelSpec,
    get: Callable[[str], Any],
    entries: list[Entry] | None = None,
) -> dict[str, Tensor]:
    """Our state dict in fp32, from a file of `layout` or of other entries.

    `get` returns a tensor by its name in the file, or raises KeyError.
    """
    entries = entries or layout(spec)
    check_tensors(entries, get)
    state = {name: torch.zeros(shape) for name, shape in parameter_shapes(spec).items()}
    for entry in entries:
        if entry.param:
            import_part(entry, get, state[entry.param].view(-1), 0)
        else:
            check_constant(entry, get, spec.config)
    return state


def import_part(entry: Entry, get: Callable[[str], Any], out: Tensor, start: int) -> None:
    """Fill `out`, elements [start, start + len(out)) of a flattened parameter, from one tensor.

    Only what the tensor has of them is written. `get` returns a tensor, or a slice of safetensors
    that reads only the rows asked for.
    """
    begin, end = entry.span
    first = max(begin, start)
    last = min(end, start + len(out))
    if first >= last:
        return
    tensor = _get_tensor(entry, get)
    if entry.transpose:
        read_from = begin
        values = tensor[:].T.reshape(-1)
    else:
        columns = (end - begin) // entry.shape[0]
        first_row = (first - begin) // columns
        stop_row = -(-(last - begin) // columns)
        read_from = begin + first_row * columns
        values = tensor[first_row:stop_row].reshape(-1)
    out[first - start : last - start] = values[first - read_from : last - read_from]


def check_constant(entry: Entry, get: Callable[[str], Any], model: ModelConfig) -> None:
    """Refuse a tensor whose values our network has no parameter for."""
    tensor = _get_tensor(entry, get)
    if torch.allclose(tensor[:].float(), constant(entry), rtol=0, atol=1e-6):
        return
    field = "bias" if entry.name.endswith("bias") else "positions"
    good = "true" if field == "bias" else "learned"
    raise CheckpointError(
        f"{entry.name} holds values that model.{field}={getattr(model, field)} cannot;"
        f" nearest: {good}"
    )


def check_tensors(entries: list[Entry], get: Callable[[str], Any]) -> None:
    """Refuse tensors of other shapes or types than the config says.

    Before memory is taken: what the config says may be anything.
    """
    for entry in entries:
        _get_tensor(entry, get)


def _get_tensor(entry: Entry, get: Callable[[str], Any]) -> Any:
    """The entry's tensor, or a slice of safetensors, of the shape that the config says."""
    tensor = _find(entry.name, get)
    kind = tensor.get_dtype() if hasattr(tensor, "get_dtype") else "F32"
    if kind not in FLOATS:
        raise CheckpointError(f"{entry.name} is of {kind}; rule: one of {', '.join(FLOATS)}")
    shape = tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
    if shape != entry.shape:
        raise CheckpointError(
            f"{entry.name} has shape {list(shape)}; rule: the config says {list(entry.shape)}"
        )
    return tensor


def _find(name: str, get: Callable[[str], Any]) -> Any:
    """Files of a bare model (openai-community/gpt2 is one) lack the first part of the names."""
    for candidate in (name, name.partition(".")[2]):
        try:
            return get(candidate)
        except KeyError:
            continue
    raise MissingTensor(
        f"the model file lacks {name}; rule: it holds every tensor that its config.json implies"
    )
