"""Our parameter names <-> transformers' layouts (GPT-2, Llama, openai-gpt), and the config.json beside them.

A layout is data: a list of entries, each saying which rows of which parameter a tensor of the file holds. Reading and
writing, whole or in slices, follow this table. What a family has and our model lacks is written when a constant says
exactly the same: absent biases and positions as zeros, sinusoidal positions as their table. transformers is not
imported.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.errors import CheckpointError, nearest
from dist_lm.model.gpt import sinusoid
from dist_lm.model.init import parameter_shapes, unpadded

Json = dict[str, Any]

GPT2_ACTIVATIONS = {
    "gelu_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}
OPENAI_ACTIVATIONS = {
    "gelu_tanh": "gelu",
    "relu": "relu",
    "silu": "silu",
}  # its "gelu" is the tanh form
# Other names that transformers gives to the same functions.
ACTIVATION_ALIASES = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}

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


class MissingTensor(CheckpointError):
    """A file lacks a tensor that its config implies."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: rows [start, stop) of a parameter, or of what is kept of it, or a constant."""

    name: str
    shape: tuple[int, ...]
    param: str = ""  # ours; empty for a constant
    rows: tuple[int, int] = (0, 0)  # before transposing
    transpose: bool = False
    constant: str = ""  # "zeros" or "sinusoid"
    key: str = ""  # of the optimizer's tensor; empty for the weight itself

    @property
    def bytes(self) -> int:
        return 4 * math.prod(self.shape)  # fp32

    @property
    def span(self) -> tuple[int, int]:
        """Which elements of the flattened parameter these are."""
        columns = math.prod(self.shape) // (self.rows[1] - self.rows[0])
        return self.rows[0] * columns, self.rows[1] * columns

    def from_flat(self, flat: Tensor) -> Tensor:
        """The tensor of the file, from those elements: fp32, contiguous."""
        tensor = flat.view(self.shape[::-1] if self.transpose else self.shape)
        return (tensor.T if self.transpose else tensor).float().contiguous()


def family(model: ModelConfig) -> str | None:
    """The transformers family that computes exactly this network, or None."""
    plain = (
        model.norm == "layernorm" and model.positions != "rope" and model.kv_heads == model.heads
    )
    if (
        plain
        and not model.qk_norm
        and model.norm_placement == "pre"
        and model.activation in GPT2_ACTIVATIONS
    ):
        return "gpt2"
    if (
        plain
        and not model.qk_norm
        and model.norm_placement == "post"
        and model.activation in OPENAI_ACTIVATIONS
    ):
        return "openai-gpt" if model.ffn_width == 4 * model.width else None
    llama = (model.norm, model.norm_placement, model.positions) == ("rmsnorm", "pre", "rope")
    return "llama" if llama and model.activation == "swiglu" and not model.qk_norm else None


# --- tensors


def layout(spec: ModelSpec) -> list[Entry]:
    """Every tensor of a saved model, in file order; our own names and layout where no family fits."""
    model, ours = spec.config, shapes(spec)
    kind = family(model)
    if kind is None:
        return own_layout(spec)
    # What the family has; what of it we lack is a constant.
    full = (
        ours
        if kind == "llama"
        else shapes(
            replace(spec, config=model.model_copy(update={"bias": True, "positions": "learned"}))
        )
    )
    entries = []
    for name, param in _names(model, kind):
        if param not in full:
            continue
        start, stop = _part(model, name, full[param][0])
        shape = (stop - start, *full[param][1:])
        # GPT-2 and openai-gpt store the matrices of their blocks as (inputs, outputs).
        transpose = kind != "llama" and ".c_" in name and len(shape) == 2
        shape = shape[::-1] if transpose else shape
        if param in ours:
            entries.append(Entry(name, shape, param, (start, stop), transpose))
        else:
            sinusoidal = param == "positions.weight" and model.positions == "sinusoidal"
            entries.append(Entry(name, shape, constant="sinusoid" if sinusoidal else "zeros"))
    return entries


def own_layout(spec: ModelSpec, key: str = "") -> list[Entry]:
    """Each of our parameters as it is, or the optimizer's tensor `key` of it."""
    return [own_entry(name, shape, key) for name, shape in shapes(spec).items()]


def own_entry(name: str, shape: tuple[int, ...], key: str = "") -> Entry:
    return Entry(f"{name}.{key}" if key else name, shape, name, (0, shape[0]), key=key)


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters, the vocabulary unpadded."""
    padded = parameter_shapes(spec)
    return {name: unpadded(name, shape, spec.vocab_size) for name, shape in padded.items()}


def _names(model: ModelConfig, kind: str) -> list[tuple[str, str]]:
    """(name in the file, our parameter), of all that a family may have."""
    first, blocks, block_names, last = {
        "gpt2": (
            {"transformer.wte": "embed", "transformer.wpe": "positions"},
            "transformer.h",
            GPT2_BLOCK,
            {"transformer.ln_f": "norm", "lm_head": "head"},
        ),
        "openai-gpt": (
            {"transformer.tokens_embed": "embed", "transformer.positions_embed": "positions"},
            "transformer.h",
            GPT2_BLOCK,
            {"lm_head": "head"},
        ),
        "llama": (
            {"model.embed_tokens": "embed"},
            "model.layers",
            LLAMA_BLOCK,
            {"model.norm": "norm", "lm_head": "head"},
        ),
    }[kind]
    pairs = list(first.items())
    for i in range(model.layers):
        pairs += [
            (f"{blocks}.{i}.{theirs}", f"blocks.{i}.{ours}") for theirs, ours in block_names.items()
        ]
    pairs += last.items()
    return [
        (f"{theirs}.{what}", f"{ours}.{what}")
        for theirs, ours in pairs
        for what in ("weight", "bias")
    ]


def _part(model: ModelConfig, name: str, rows: int) -> tuple[int, int]:
    """The rows of our parameter that a tensor of a file holds: Llama's queries, keys and values are apart."""
    q, kv = model.width, model.kv_heads * (model.width // model.heads)
    parts = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
    return parts.get(name.split(".")[-2], (0, rows))


def constant(entry: Entry) -> Tensor:
    return sinusoid(*entry.shape) if entry.constant == "sinusoid" else torch.zeros(entry.shape)


def import_tensors(
    spec: ModelSpec,
    get: Callable[[str], Any],
    entries: list[Entry] | None = None,
) -> dict[str, Tensor]:
    """Our state dict, fp32, from a file of `layout`, or of other entries. `get` reads by name, or raises KeyError."""
    state = {name: torch.zeros(shape) for name, shape in parameter_shapes(spec).items()}
    for entry in entries or layout(spec):
        import_part(
            entry, get, state[entry.param].view(-1) if entry.param else None, 0, spec.config
        )
    return state


def import_part(
    entry: Entry, get: Callable[[str], Any], out: Tensor | None, start: int, model: ModelConfig
) -> None:
    """Copy what an entry's tensor says of elements [start, start + len(out)) of its flattened parameter.

    `get` gives a tensor, or a slice of safetensors that reads only the rows asked for. Constants are compared.
    """
    begin, end = entry.span if entry.param else (0, 0)
    first, last = (max(begin, start), min(end, start + len(out))) if out is not None else (0, 0)
    if entry.param and first >= last:
        return
    tensor = _find(entry.name, get)
    shape = tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
    if shape != entry.shape:
        raise CheckpointError(
            f"{entry.name} has shape {list(shape)}; rule: the config says {list(entry.shape)}"
        )
    if out is None:
        if not torch.allclose(tensor[:].float(), constant(entry), rtol=0, atol=1e-6):
            field, good = (
                ("bias", "true") if entry.name.endswith("bias") else ("positions", "learned")
            )
            raise CheckpointError(
                f"{entry.name} holds values that model.{field}={getattr(model, field)} cannot; nearest: {good}"
            )
        return
    skipped = 0
    if entry.transpose:
        flat = tensor[:].T.reshape(-1)
    else:
        columns = (end - begin) // shape[0]
        row = (first - begin) // columns
        skipped, flat = row * columns, tensor[row : -(-(last - begin) // columns)].reshape(-1)
    at = first - begin - skipped
    out[first - start : last - start] = flat[at : at + last - first]


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


# --- config.json


def config_json(spec: ModelSpec, eot_id: int | None) -> Json:
    """The config.json that makes AutoModelForCausalLM build this network."""
    model, seq_len = spec.config, spec.seq_len
    common: Json = {
        "vocab_size": spec.vocab_size,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": "float32",
    }
    kind = family(model)
    if kind is None:
        return {
            "model_type": "dist_lm",
            "architectures": ["GPT"],
            **common,
            "seq_len": seq_len,
            "model": model.model_dump(mode="json"),
        }
    common |= {"model_type": kind, "tie_word_embeddings": model.tie_embeddings}
    if kind == "llama":
        rope = {"rope_type": "default", "rope_theta": model.rope_theta}
        return {
            **common,
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": model.width,
            "intermediate_size": model.ffn_width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.width // model.heads,
            "hidden_act": "silu",
            "max_position_embeddings": seq_len,
            "rms_norm_eps": model.norm_eps,
            "rope_parameters": rope,
            "rope_theta": model.rope_theta,
            "attention_bias": model.bias,
            "mlp_bias": model.bias,
        }
    common |= {
        "n_positions": seq_len,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "layer_norm_epsilon": model.norm_eps,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": 0.0,
    }
    if kind == "openai-gpt":
        return {
            **common,
            "architectures": ["OpenAIGPTLMHeadModel"],
            "afn": OPENAI_ACTIVATIONS[model.activation],
        }
    return {
        **common,
        "architectures": ["GPT2LMHeadModel"],
        "n_inner": model.ffn_width,
        "activation_function": GPT2_ACTIVATIONS[model.activation],
    }


def generation_config_json(eot_id: int | None) -> Json:
    """The generation_config.json beside it: what ends a text, and fills rows of a batch that ended."""
    return {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}


def from_config_json(config: Json) -> ModelSpec:
    """The network of a config.json, ours or transformers'; what we cannot do is refused."""
    kind = str(config.get("model_type"))
    if kind not in _KINDS:
        raise CheckpointError(
            f"config.json: model_type={kind!r} must be one of {', '.join(_KINDS)};"
            f" nearest: {nearest(kind, _KINDS) or 'llama'}"
        )
    _require(config, "quantization_config", None, None)
    reader, vocab_size, field, seq_len = _KINDS[kind]
    try:
        model = ModelConfig(**reader(config))
        return ModelSpec(
            model, int(config.get("vocab_size", vocab_size)), int(config.get(field, seq_len))
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f" model.{part}={first['input']!r}" for part in first["loc"])
        raise CheckpointError(
            f"config.json: cannot be a model of ours:{where} {first['msg']}"
        ) from None
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"config.json: not as transformers or dist_lm write it ({error!r})"
        ) from None


def _require(config: Mapping[str, Any], field: str, default: Any, *allowed: Any) -> Any:
    """A field's value, which must be one that our network can take."""
    value = config.get(field, default)
    if value not in allowed:
        raise CheckpointError(
            f"config.json: {field}={value!r} is not supported; rule: one of {', '.join(map(repr, allowed))};"
            f" nearest: {allowed[0]!r}"
        )
    return value


def _from_gpt2(config: Json) -> Json:
    """gpt2 and openai-gpt. Dropout stays 0: theirs also drops attention, and loading is not training."""
    post = config["model_type"] == "openai-gpt"
    names = OPENAI_ACTIVATIONS if post else GPT2_ACTIVATIONS
    field, default = ("afn", "gelu") if post else ("activation_function", "gelu_new")
    theirs = config.get(field, default)
    theirs = ACTIVATION_ALIASES.get(theirs, theirs)
    activation = _require({field: theirs}, field, None, *names.values())
    _require(config, "scale_attn_weights", True, True)
    _require(config, "scale_attn_by_inverse_layer_idx", False, False)
    _require(config, "add_cross_attention", False, False)
    width = config.get("n_embd", 768)
    return {
        "layers": config.get("n_layer", 12),
        "heads": config.get("n_head", 12),
        "width": width,
        "ffn_width": (not post and config.get("n_inner")) or 4 * width,
        "positions": "learned",
        "norm": "layernorm",
        "norm_placement": "post" if post else "pre",
        "bias": True,
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": next(ours for ours, name in names.items() if name == activation),
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def _from_llama(config: Json) -> Json:
    _require(config, "hidden_act", "silu", "silu", "swish")
    bias = config.get("attention_bias", False)
    _require(config, "mlp_bias", False, bias)
    width, heads = config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
    _require(config, "head_dim", None, width // heads, None)
    # transformers 5 keeps all of rope in rope_parameters; before, rope_scaling held what was not default.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for field in ("rope_type", "type"):
        _require(rope, field, "default", "default")
    _require(rope, "partial_rotary_factor", 1.0, 1.0)
    return {
        "layers": config.get("num_hidden_layers", 32),
        "heads": heads,
        "width": width,
        "bias": bias,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "ffn_width": config.get("intermediate_size", 11008),
        "positions": "rope",
        "norm": "rmsnorm",
        "norm_placement": "pre",
        "activation": "swiglu",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
    }


# How a config.json is read; its vocabulary where it leaves that out; its field for the context, and that left out.
_KINDS: dict[str, tuple[Callable[[Json], Json], int, str, int]] = {
    "gpt2": (_from_gpt2, 50257, "n_positions", 1024),
    "openai-gpt": (_from_gpt2, 40478, "n_positions", 512),
    "llama": (_from_llama, 32000, "max_position_embeddings", 2048),
    "dist_lm": (lambda config: config["model"], 0, "seq_len", 0),
}
