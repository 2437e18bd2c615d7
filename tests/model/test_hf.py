"""Our models are transformers' models: same logits, loss and gradients, in both directions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OpenAIGPTConfig,
    PreTrainedModel,
    Qwen3Config,
)

from dist_lm import families
from dist_lm.cli import load
from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.errors import UserError
from dist_lm.model import hf
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.model.positions import sinusoid
from dist_lm.outcome import TRAIN
from tests.conftest import export_tensor
from tests.procs import ROOT

V, T, EOT = 101, 24, 100
GPT2 = {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True}
POST = {**GPT2, "norm_placement": "post"}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-gqa": (
        "llama",
        {"kv_heads": 2, "tie_embeddings": False, "rope_theta": 500.0, "norm_eps": 1e-4},
    ),
    "llama-bias": ("llama", {"bias": True, "ffn_width": 40, "kv_heads": 1}),
    "qwen3": ("qwen3", {"qk_norm": True}),
    "qwen3-gqa": (
        "qwen3",
        {
            "qk_norm": True,
            "kv_heads": 2,
            "tie_embeddings": False,
            "rope_theta": 500.0,
            "norm_eps": 1e-3,
        },
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": (
        "gpt2",
        {**GPT2, "tie_embeddings": False, "activation": "gelu", "ffn_width": 40},
    ),
    "gpt2-sinusoidal": (
        "gpt2",
        {**GPT2, "positions": "sinusoidal", "bias": False, "activation": "relu2"},
    ),
    "gpt2-no-positions": (
        "gpt2",
        {**GPT2, "positions": "none", "activation": "silu", "norm_eps": 1e-4},
    ),
    "post": ("openai-gpt", {**POST, "activation": "relu"}),
    "post-untied": ("openai-gpt", {**POST, "tie_embeddings": False, "activation": "silu"}),
    "post-sinusoidal": ("openai-gpt", {**POST, "positions": "sinusoidal", "bias": False}),
}
NO_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3 with biases": {"qk_norm": True, "bias": True},
    "qwen3 without positions": {"qk_norm": True, "positions": "none"},
    "qwen3 after the sum": {"qk_norm": True, "norm_placement": "post"},
    "gpt2 with gqa": {**GPT2, "kv_heads": 2},
    "gpt2 with rmsnorm": {**GPT2, "norm": "rmsnorm"},
    "gpt2 with rope": {**GPT2, "positions": "rope"},
    "gpt2 with swiglu": {**GPT2, "activation": "swiglu"},
    "gpt2 with qk_norm": {**GPT2, "qk_norm": True},
    "llama with layernorm": {"norm": "layernorm"},
    "llama after the sum": {"norm_placement": "post"},
    "llama with sinusoids": {"positions": "sinusoidal"},
    "llama with gelu": {"activation": "gelu"},
    "post with exact gelu": {**POST, "activation": "gelu"},
    "post with another width": {**POST, "ffn_width": 40},
}
# What transformers makes itself, fields left at their defaults where they can be.
THEIRS = {
    "llama": LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=T,
    ),
    "llama-bias": LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        max_position_embeddings=T,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        tie_word_embeddings=True,
    ),
    "qwen3": Qwen3Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=T,
    ),
    "gpt2": GPT2Config(vocab_size=V, n_positions=T, n_embd=32, n_layer=2, n_head=4),
    "gpt2-relu": GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=40,
        activation_function="relu",
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-3,
    ),
    "openai-gpt": OpenAIGPTConfig(vocab_size=V, n_positions=T, n_embd=32, n_layer=2, n_head=4),
    "openai-gpt-relu": OpenAIGPTConfig(
        vocab_size=V, n_positions=T, n_embd=32, n_layer=2, n_head=4, afn="relu"
    ),
}


def config_of(name: str) -> ModelConfig:
    return ModelConfig(layers=2, heads=4, width=32, **{**OURS[name][1]})


def make(config: ModelConfig) -> GPT:
    """A model whose every weight, biases and norms too, is away from where it starts."""
    model = GPT(ModelSpec(config, V, T))
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        rows = (
            min(V, len(parameter))
            if parameter.dim() == 2 and len(parameter) == 104
            else len(parameter)
        )
        parameter.data[:rows] += 0.1 * torch.randn(rows, *parameter.shape[1:], generator=generator)
    return model


def write(model: GPT, folder: Path) -> None:
    weights = dict(model.named_parameters())
    entries = hf.layout(ModelSpec(model.config, V, T))
    save_file(
        {entry.name: export_tensor(entry, weights) for entry in entries},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(
        json.dumps(families.config_json(ModelSpec(model.config, V, T), EOT))
    )
    (folder / "generation_config.json").write_text(json.dumps(families.generation_config_json(EOT)))


def assert_same_network(ours: GPT, theirs: PreTrainedModel) -> None:
    """Logits, loss and every gradient."""
    tokens_BT = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(3))
    targets_BT = torch.full((2, T), -100)
    targets_BT[:, :-1] = tokens_BT[:, 1:]
    targets_BT[0, 3:7] = -100
    labels_BT = torch.cat([torch.full((2, 1), -100), targets_BT[:, :-1]], 1)
    count = int((targets_BT != -100).sum())
    loss, answer = (
        ours(tokens_BT, targets_BT) / count,
        theirs(input_ids=tokens_BT, labels=labels_BT),
    )
    assert (ours(tokens_BT) - answer.logits).abs().max() < 1e-4
    assert answer.logits.std() > 0.05
    assert torch.allclose(loss, answer.loss, rtol=1e-6)
    loss.backward()
    answer.loss.backward()
    own = {name: parameter.grad for name, parameter in ours.named_parameters()}
    their = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(grad.abs().max() for grad in their.values())
    entries = [entry for entry in hf.layout(ModelSpec(ours.config, V, T)) if entry.param]
    assert {entry.param for entry in entries} == set(own)
    for entry in entries:
        assert (export_tensor(entry, own) - their[entry.name]).abs().max() < 1e-5 * largest, (
            entry.name
        )


@pytest.mark.parametrize("name", OURS)
def test_a_folder_of_ours_is_a_model_of_theirs(name: str, tmp_path: Path) -> None:
    kind, config = OURS[name][0], config_of(name)
    assert families.family(config) == kind
    ours = make(config)
    write(ours, tmp_path)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or of another shape
    assert theirs.config.model_type == kind and theirs.get_output_embeddings().weight.shape[0] == V
    assert theirs.generation_config.eos_token_id == EOT
    assert_same_network(ours, theirs.eval())


@pytest.mark.parametrize("name", OURS)
def test_a_folder_of_ours_is_read_back(name: str, tmp_path: Path) -> None:
    """As itself by its own config, and by its config.json as a network with the same logits."""
    ours = make(config_of(name))
    write(ours, tmp_path)
    weights = dict(ours.named_parameters())
    tensors = {
        entry.name: export_tensor(entry, weights)
        for entry in hf.layout(ModelSpec(ours.config, V, T))
    }
    for name_of_tensor, value in hf.import_tensors(
        ModelSpec(ours.config, V, T), tensors.__getitem__
    ).items():
        assert torch.equal(value, weights[name_of_tensor])
    described = families.from_config_json(json.loads((tmp_path / "config.json").read_text()))
    assert (described.vocab_size, described.seq_len) == (V, T)
    # In their terms positions are a learned table and biases are there.
    gpt = families.family(ours.config) not in hf.ROPE_FAMILIES
    assert described.config == ours.config.model_copy(
        update={"positions": "learned", "bias": True} if gpt else {}
    )
    again = GPT(described)
    again.load_state_dict(hf.import_tensors(described, tensors.__getitem__))
    tokens_BT = torch.arange(2 * T).view(2, T)
    assert torch.allclose(again(tokens_BT), ours(tokens_BT), atol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
def test_a_model_of_theirs_is_read(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(THEIRS[name])
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    spec = families.from_config_json(json.loads((tmp_path / "config.json").read_text()))
    assert (spec.vocab_size, spec.seq_len) == (V, T)
    assert families.family(spec.config) == THEIRS[name].model_type
    ours = GPT(spec)
    tensors = theirs.state_dict()
    ours.load_state_dict(hf.import_tensors(spec, tensors.__getitem__))
    assert_same_network(ours, theirs.eval())


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "openai-gpt"])
def test_defaults_left_out_are_theirs(family: str) -> None:
    """A config.json holds little more than what differs from transformers' defaults."""
    full = transformers.AutoConfig.for_model(family).to_dict()
    assert families.from_config_json({"model_type": family}) == families.from_config_json(full)


def test_older_and_other_spellings_are_read() -> None:
    older = {**LLAMA_JSON, "rope_theta": 500.0, "rope_scaling": None, "hidden_act": "swish"}
    assert families.from_config_json(older).config.rope_theta == 500.0
    for name, ours in (
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("swish", "silu"),
    ):
        assert (
            families.from_config_json({**GPT2_JSON, "activation_function": name}).config.activation
            == ours
        )


def test_names_without_their_first_part_are_found() -> None:
    """As in openai-community/gpt2, and in bf16."""
    ours = make(config_of("gpt2"))
    weights = dict(ours.named_parameters())
    entries = hf.layout(ModelSpec(ours.config, V, T))
    bare = {
        entry.name.removeprefix("transformer."): export_tensor(entry, weights).bfloat16()
        for entry in entries
    }
    for name, value in hf.import_tensors(ModelSpec(ours.config, V, T), bare.__getitem__).items():
        assert value.dtype == torch.float32 and torch.equal(value, weights[name].bfloat16().float())


@pytest.mark.parametrize("name", NO_FAMILY)
def test_other_combinations_keep_our_names(name: str) -> None:
    config = ModelConfig(**{"layers": 2, "heads": 4, "width": 32, **NO_FAMILY[name]})
    assert families.family(config) is None
    ours = make(config)
    weights = dict(ours.named_parameters())
    entries = hf.layout(ModelSpec(config, V, T))
    assert [entry.name for entry in entries] == list(weights)
    tensors = {entry.name: export_tensor(entry, weights) for entry in entries}
    assert tensors["embed.weight"].shape == (V, 32)  # unpadded
    back = hf.import_tensors(ModelSpec(config, V, T), tensors.__getitem__)
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    described = json.loads(json.dumps(families.config_json(ModelSpec(config, V, T), None)))
    assert described["model_type"] == "dist_lm"
    assert families.from_config_json(described) == ModelSpec(config, V, T)


def test_every_recipe_is_in_a_family() -> None:
    found = {}
    for path in (ROOT / "configs").glob("*.yaml"):
        config, _ = load(["--config", str(path)], TRAIN)
        found[path.stem.split("-")[0]] = families.family(config.model)
    assert found.pop("finetune") == "llama"  # the default, where no model is given
    assert found == {"char": "openai-gpt", "gpt2": "gpt2", "llama": "llama", "debug": "llama"}


def test_layout_is_data() -> None:
    """Shapes and rows are known without tensors: a file can be laid out before it is written."""
    config = ModelConfig(layers=1, heads=4, kv_heads=2, width=32)
    entries = {entry.name: entry for entry in hf.layout(ModelSpec(config, V, T))}
    assert entries["model.layers.0.self_attn.k_proj.weight"] == hf.Entry(
        "model.layers.0.self_attn.k_proj.weight", (16, 32), "blocks.0.attn.qkv.weight", (32, 48)
    )
    post = {entry.name: entry for entry in hf.layout(ModelSpec(config_of("post-sinusoidal"), V, T))}
    assert post["transformer.h.1.mlp.c_fc.weight"].transpose and post[
        "transformer.h.1.mlp.c_fc.weight"
    ].shape == (
        32,
        128,
    )
    assert post["transformer.positions_embed.weight"].constant == "sinusoid"
    assert torch.equal(
        export_tensor(post["transformer.positions_embed.weight"], {}), sinusoid(T, 32)
    )
    assert post["transformer.h.0.attn.c_attn.bias"] == hf.Entry(
        "transformer.h.0.attn.c_attn.bias", (96,), constant="zeros"
    )


# --- refusals

LLAMA_JSON: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}
QWEN3_JSON: dict[str, Any] = {
    **LLAMA_JSON,
    "model_type": "qwen3",
    "num_key_value_heads": 2,
    "head_dim": 8,
}
GPT2_JSON: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_head": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt_2"},
            "model_type='gpt_2' must be one of gpt2, openai-gpt, llama, qwen3, dist_lm;"
            " nearest: gpt2",
        ),
        (
            {},
            "model_type='None' must be one of gpt2, openai-gpt, llama, qwen3, dist_lm;"
            " nearest: llama",
        ),
        ({**QWEN3_JSON, "head_dim": 16}, "head_dim=16 is not supported; rule: one of 8, None"),
        (
            {key: value for key, value in QWEN3_JSON.items() if key != "head_dim"},
            "head_dim=128 is not supported; rule: one of 8, None",
        ),
        ({**QWEN3_JSON, "attention_bias": True}, "attention_bias=True is not supported"),
        ({**QWEN3_JSON, "use_sliding_window": True}, "use_sliding_window=True is not supported"),
        (
            {**QWEN3_JSON, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types='sliding_attention' is not supported; rule: one of 'full_attention'",
        ),
        (
            {**LLAMA_JSON, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "type='linear' is not supported; rule: one of 'default'; nearest: 'default'",
        ),
        (
            {**LLAMA_JSON, "rope_parameters": {"rope_type": "llama3"}},
            "rope_type='llama3' is not supported",
        ),
        (
            {**LLAMA_JSON, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not",
        ),
        (
            {**LLAMA_JSON, "attention_bias": True},
            "mlp_bias=False is not supported; rule: one of True; nearest: True",
        ),
        (
            {**LLAMA_JSON, "hidden_act": "gelu"},
            "hidden_act='gelu' is not supported; rule: one of 'silu', 'swish'",
        ),
        (
            {**LLAMA_JSON, "head_dim": 16},
            "head_dim=16 is not supported; rule: one of 8, None; nearest: 8",
        ),
        (
            {**LLAMA_JSON, "quantization_config": {"bits": 4}},
            "quantization_config={'bits': 4} is not supported",
        ),
        (
            {**GPT2_JSON, "activation_function": "mish"},
            "activation_function='mish' is not supported; rule: one of",
        ),
        ({**GPT2_JSON, "scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
        (
            {**GPT2_JSON, "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True is not",
        ),
        ({**GPT2_JSON, "add_cross_attention": True}, "add_cross_attention=True is not supported"),
        (
            {**GPT2_JSON, "n_layer": 0},
            "cannot be a model of ours: model.layers=0: Input should be greater than",
        ),
        ({**GPT2_JSON, "n_head": 5}, "model.heads=5 does not divide model.width=32; nearest: 4, 8"),
        ({"model_type": "dist_lm"}, "not as transformers or dist_lm write it (KeyError: 'model')"),
        (
            {**LLAMA_JSON, "hidden_size": "wide"},
            "not as transformers or dist_lm write it (TypeError: ",
        ),
    ],
)
def test_what_we_cannot_compute_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        families.from_config_json(config)
    assert str(error.value).startswith("config.json: ") and message in str(error.value)
    assert "\n" not in str(error.value) and error.value.code == 66


@pytest.fixture
def tensors() -> Iterator[dict[str, Tensor]]:
    weights = dict(make(config_of("gpt2")).named_parameters())
    yield {
        entry.name: export_tensor(entry, weights)
        for entry in hf.layout(ModelSpec(config_of("gpt2"), V, T))
    }


def refusal(config: ModelConfig, tensors: dict[str, Tensor]) -> str:
    with pytest.raises(UserError) as error:
        hf.import_tensors(ModelSpec(config, V, T), tensors.__getitem__)
    assert error.value.code == 66
    return str(error.value)


def test_a_tensor_that_lacks_or_does_not_fit_is_refused(tensors: dict[str, Tensor]) -> None:
    config = config_of("gpt2")
    lacking = {name: tensor for name, tensor in tensors.items() if name != "transformer.ln_f.bias"}
    assert refusal(config, lacking) == (
        "the model file lacks transformer.ln_f.bias;"
        " rule: it holds every tensor that its config.json implies"
    )
    cut = {**tensors, "transformer.wpe.weight": tensors["transformer.wpe.weight"][:-1]}
    assert (
        refusal(config, cut)
        == "transformer.wpe.weight has shape [23, 32]; rule: the config says [24, 32]"
    )


def test_values_that_our_config_has_no_place_for_are_refused(tensors: dict[str, Tensor]) -> None:
    assert refusal(config_of("gpt2").model_copy(update={"bias": False}), tensors) == (
        "transformer.h.0.ln_1.bias holds values that model.bias=False cannot; nearest: true"
    )
    for positions in ("sinusoidal", "none"):
        assert refusal(config_of("gpt2").model_copy(update={"positions": positions}), tensors) == (
            f"transformer.wpe.weight holds values that model.positions={positions} cannot;"
            " nearest: learned"
        )
