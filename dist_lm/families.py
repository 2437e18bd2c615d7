"""The families of transformers that compute our networks, and their config.json.

GPT-2, Llama, Qwen3 and post-norm openai-gpt. Neither torch nor transformers is imported, so that a
command line that names a model is answered at once. Their tensors are in model/hf.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from dist_lm.config import LONGEST_CONTEXT, ModelConfig, ModelSpec
from dist_lm.errors import CheckpointError, in_a_line
from dist_lm.nearest import nearest
from dist_lm.outside import CheckedModel, check, first_fault

Json = dict[str, Any]

OWN_TYPE = "dist_lm"  # the model_type of networks that no family computes

# Our activations, as a family calls them.
GPT2_ACTIVATIONS = {
    "gelu_tanh": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}
# The "gelu" of openai-gpt is the tanh form.
OPENAI_ACTIVATIONS = {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}
# Other names that transformers gives to the same functions.
ACTIVATION_ALIASES = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
# Where transformers takes something else for a field of Qwen3 left out than for one of Llama.
QWEN3_DEFAULTS: Json = {"head_dim": 128, "num_key_value_heads": 32, "intermediate_size": 22016}


def family(model: ModelConfig) -> str | None:
    """The transformers family that computes exactly this network, or None."""
    if model.norm == "rmsnorm":
        return _family_with_rope(model)
    if model.qk_norm:
        return None
    if model.positions == "rope" or model.kv_heads != model.heads:
        return None
    if model.norm_placement == "pre":
        return "gpt2" if model.activation in GPT2_ACTIVATIONS else None
    # openai-gpt has no setting for the hidden width of its feed-forward.
    has_its_width = model.ffn_width == 4 * model.width
    return "openai-gpt" if has_its_width and model.activation in OPENAI_ACTIVATIONS else None


def _family_with_rope(model: ModelConfig) -> str | None:
    """Llama, or with norms of queries and keys Qwen3, whose feed-forward never has biases."""
    if model.norm_placement != "pre" or model.positions != "rope" or model.activation != "swiglu":
        return None
    if not model.qk_norm:
        return "llama"
    return None if model.bias else "qwen3"


# --- config.json: writing it


def config_json(spec: ModelSpec, eot_id: int | None) -> Json:
    """The config.json that makes AutoModelForCausalLM build this network."""
    model = spec.config
    common: Json = {
        "vocab_size": spec.vocab_size,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": "float32",
    }
    kind = family(model)
    if kind is None:
        return {
            "model_type": OWN_TYPE,
            "architectures": ["GPT"],
            **common,
            "seq_len": spec.seq_len,
            "model": model.model_dump(mode="json"),
        }
    common |= {"model_type": kind, "tie_word_embeddings": model.tie_embeddings}
    if kind == "llama":
        biases = {"attention_bias": model.bias, "mlp_bias": model.bias}
        return common | _rope_fields(spec) | {"architectures": ["LlamaForCausalLM"], **biases}
    if kind == "qwen3":
        return common | _rope_fields(spec) | {"architectures": ["Qwen3ForCausalLM"]}
    common |= _gpt2_fields(spec)
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


def _rope_fields(spec: ModelSpec) -> Json:
    """What llama and qwen3 call by the same names."""
    model = spec.config
    return {
        "hidden_size": model.width,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width // model.heads,
        "hidden_act": "silu",
        "max_position_embeddings": spec.seq_len,
        "rms_norm_eps": model.norm_eps,
        # transformers 5 reads the first of these, older ones the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
    }


def _gpt2_fields(spec: ModelSpec) -> Json:
    """What gpt2 and openai-gpt call by the same names."""
    model = spec.config
    return {
        "n_positions": spec.seq_len,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "layer_norm_epsilon": model.norm_eps,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": 0.0,
    }


def generation_config_json(eot_id: int | None) -> Json:
    """The generation_config.json: what ends a text, and what fills rows of a batch that ended."""
    return {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}


# --- config.json: reading it


def from_config_json(config: Json) -> ModelSpec:
    """The network of a config.json, ours or transformers'; what we cannot compute is refused."""
    kind = str(config.get("model_type"))
    if kind not in READERS:
        raise CheckpointError(
            f"config.json: model_type={kind!r} must be one of {', '.join(READERS)};"
            f" nearest: {nearest(kind, READERS) or 'llama'}"
        )
    _require(config, "quantization_config", None, None)
    reader = READERS[kind]
    try:
        model = ModelConfig(**reader.read(config))
    except ValidationError as error:
        raise CheckpointError(
            f"config.json: cannot be a model of ours: model.{first_fault(error)}"
        ) from None
    # Of what arithmetic with foreign values raises.
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(
            f"config.json: not as transformers or dist_lm write it ({in_a_line(error)})"
        ) from None
    found = {
        "vocab_size": config.get("vocab_size", reader.default_vocab_size),
        "context": config.get(reader.context_field, reader.default_context),
    }
    sizes = check(found, _Sizes, lambda why: CheckpointError(f"config.json: {why}"))
    return ModelSpec(model, sizes.vocab_size, sizes.context)


class _Sizes(CheckedModel):
    """Sizes of a network beside those of ModelConfig, with limits above any that was trained."""

    vocab_size: int = Field(ge=1, le=10**8)
    context: int = Field(ge=1, le=LONGEST_CONTEXT)


def _require(config: Mapping[str, Any], field: str, default: Any, *allowed: Any) -> Any:
    """A field's value, which must be one that our network can take."""
    value = config.get(field, default)
    if value not in allowed:
        raise CheckpointError(
            f"config.json: {field}={value!r} is not supported;"
            f" rule: one of {', '.join(map(repr, allowed))};"
            f" nearest: {allowed[0]!r}"
        )
    return value


def _read_dist_lm(config: Json) -> Json:
    model: Json = config["model"]
    return model


def _read_gpt2(config: Json) -> Json:
    """The config.json of gpt2 and openai-gpt.

    Dropout stays 0: theirs also drops attention, and loading is not training.
    """
    is_openai = config["model_type"] == "openai-gpt"
    activation = _read_gpt2_activation(config, is_openai)
    width = config.get("n_embd", 768)
    _require(config, "scale_attn_weights", True, True)
    _require(config, "scale_attn_by_inverse_layer_idx", False, False)
    _require(config, "add_cross_attention", False, False)
    inner_width = None if is_openai else config.get("n_inner")
    return {
        "layers": config.get("n_layer", 12),
        "heads": config.get("n_head", 12),
        "width": width,
        "ffn_width": inner_width or 4 * width,
        "positions": "learned",
        "norm": "layernorm",
        "norm_placement": "post" if is_openai else "pre",
        "bias": True,
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": activation,
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def _read_gpt2_activation(config: Json, is_openai: bool) -> str:
    """Our name of the activation."""
    if is_openai:
        names = OPENAI_ACTIVATIONS
        field = "afn"
        name = config.get(field, "gelu")
    else:
        names = GPT2_ACTIVATIONS
        field = "activation_function"
        name = config.get(field, "gelu_new")
    name = ACTIVATION_ALIASES.get(name, name)
    _require({field: name}, field, None, *names.values())
    return next(ours for ours, in_file in names.items() if in_file == name)


def _read_llama(config: Json) -> Json:
    bias = config.get("attention_bias", False)
    _require(config, "mlp_bias", False, bias)
    return {**_read_rope_model(config), "bias": bias}


def _read_qwen3(config: Json) -> Json:
    config = QWEN3_DEFAULTS | config
    _require(config, "attention_bias", False, False)  # its feed-forward has none, ours would
    _require(config, "use_sliding_window", False, False)
    for kind in config.get("layer_types") or []:
        _require({"layer_types": kind}, "layer_types", None, "full_attention")
    return {**_read_rope_model(config), "qk_norm": True}


def _read_rope_model(config: Json) -> Json:
    """What the config.json of llama and qwen3 have in common."""
    _require(config, "hidden_act", "silu", "silu", "swish")
    width = config.get("hidden_size", 4096)
    heads = config.get("num_attention_heads", 32)
    _require(config, "head_dim", None, width // heads, None)
    # transformers 5 keeps all of rope in rope_parameters. Before, rope_scaling held what was not
    # default.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _require(rope, "rope_type", "default", "default")
    _require(rope, "type", "default", "default")
    _require(rope, "partial_rotary_factor", 1.0, 1.0)
    return {
        "layers": config.get("num_hidden_layers", 32),
        "heads": heads,
        "width": width,
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


@dataclass(frozen=True)
class ConfigReader:
    """How a family's config.json is read, and what transformers takes for fields left out."""

    read: Callable[[Json], Json]  # to the fields of a ModelConfig
    context_field: str
    default_vocab_size: int
    default_context: int


READERS = {
    "gpt2": ConfigReader(_read_gpt2, "n_positions", 50257, 1024),
    "openai-gpt": ConfigReader(_read_gpt2, "n_positions", 40478, 512),
    "llama": ConfigReader(_read_llama, "max_position_embeddings", 32000, 2048),
    "qwen3": ConfigReader(_read_qwen3, "max_position_embeddings", 151936, 32768),
    OWN_TYPE: ConfigReader(_read_dist_lm, "seq_len", 0, 0),
}
