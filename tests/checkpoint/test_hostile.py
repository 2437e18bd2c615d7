"""A checkpoint or transformers folder of a stranger: right, passed over, or refused in one line."""

import hashlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_lm import families
from dist_lm.checkpoint.folder import newest_valid
from dist_lm.checkpoint.load import read_model
from dist_lm.checkpoint.state import verify_state
from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.data.packing import ConcatPacker, Document
from dist_lm.data.stream import Stream
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import CheckpointError
from dist_lm.model.gpt import GPT
from dist_lm.resume import _grows
from tests.conftest import state_of, write_step

CURSOR = {"pass": 0, "block": 0, "part": 0, "row": 0, "document": 3, "offset": 45}
STREAM = {"pass": 0, "turn": 1, "done": [], "lanes": {"0": CURSOR}}
STREAMS = {"streams": {"text": STREAM}, "ended": [[8, 0]], "end": None}
GPT2 = ModelConfig(
    layers=2,
    heads=2,
    width=16,
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    bias=True,
)
LLAMA = ModelConfig(layers=2, heads=2, width=16)
SECONDS = 2
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2.5,
    1e12,
    10**12,
    2**63,
    "",
    "x",
    "1",
    "\x1b[2J",
    "x" * 9_999,
    [],
    [1],
] + [{}, {"a": 1}, float("inf"), float("nan"), -(10**9), [[]], [{}], {"rope_theta": "x"}]


def write(run: Path, step: int, model: ModelConfig = LLAMA) -> Path:
    tokenizer = train_tokenizer("byte", [])
    spec = ModelSpec(model, tokenizer.vocab_size, 8)
    texts = {
        "config.json": families.config_json(spec, tokenizer.eot),
        "state.json": state_of(step, streams=STREAMS, config={"model": {"layers": 2}}),
    }
    torch.manual_seed(0)
    return write_step(run, step, GPT(spec), texts, tokenizer)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    for step in (3, 200):
        write(run, step)
    return run


@pytest.fixture(scope="module", params=[LLAMA, GPT2], ids=["llama", "gpt2"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers' layout, without a manifest."""
    folder = write(tmp_path_factory.mktemp("plain"), 1, request.param)
    for name in ("manifest.json", "state.json"):
        (folder / name).unlink()
    return folder


def sign(folder: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint, with its size and hash in the manifest."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def without(name: str) -> str:
    state = state_of(200, streams=STREAMS)
    del state[name]
    return json.dumps(state)


def with_streams(**changes: Any) -> str:
    return json.dumps(state_of(200, streams={**STREAMS, **changes}))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("config"), "config: Field required"),
        (without("scaler"), "scaler: Field required"),
        (json.dumps(state_of(200, config=[])), "config=[]"),
        (json.dumps(state_of(200, config={"model": 3})), "config.model=3"),
        (json.dumps(state_of(200, streams=[])), "streams=[]"),
        (json.dumps(state_of("200")), "step='200'"),
        (json.dumps(state_of(-5)), "step=-5"),
        (json.dumps(state_of(3)), "is of step 3"),
        (json.dumps(state_of(200, tokens=1.5)), "tokens=1.5"),
        (json.dumps(state_of(200, tokens=10**30)), "is not a number of 64 bits"),
        (json.dumps(state_of(200, scaler={"scale": "x"})), "scaler.scale='x'"),
        (json.dumps(state_of(200, data={"a": 1})), "data={'a': 1}"),
        (with_streams(ended=[[1]]), "ended.0=[1]"),
        (with_streams(streams={"text": {**STREAM, "lanes": []}}), "streams.text.lanes=[]"),
        (with_streams(streams={"text": {**STREAM, "done": 3}}), "streams.text.done=3"),
        (with_streams(streams={"text": {**STREAM, "lanes": {"0": {}}}}), "lanes.0.pass: Field"),
        (with_streams(end="x"), "end='x'"),
        (json.dumps(state_of(200, stepped_over=[[0, 2**40]])), "must have 1 to 1000 batches"),
        (json.dumps(state_of(200, stepped_over=[[5, 5]])), "must have 1 to 1000 batches"),
        (json.dumps(state_of(200, stepped_over=[3])), "stepped_over.0=3"),
        (json.dumps(state_of(200, recent=[["x", 1.0]])), "recent.0.0='x'"),
        ("[" * 100_000, "deeper than 64 levels"),
        ("[]", "must be a JSON object"),
        ('{"step": 200, "step": 3}', "'step' stands twice"),
    ],
)
def test_a_state_of_wrong_shape_is_passed_over(
    steps: Path, tmp_path: Path, state: str, message: str
) -> None:
    run = shutil.copytree(steps, tmp_path / "run")
    sign(run / "step-00000200", "state.json", state.encode())
    found, passed_over = newest_valid(run, verify_state)
    assert found == run / "step-00000003"
    (why,) = passed_over
    assert message in why and why.startswith("step-00000200/state.json: ")


def test_a_right_state_is_taken(steps: Path) -> None:
    assert newest_valid(steps, verify_state) == (steps / "step-00000200", [])


EDITS: list[Callable[[dict[str, Any]], object]] = [
    lambda c: c.update(num_hidden_layers=10**9, n_layer=10**9),
    lambda c: c.update(vocab_size=10**12),
    lambda c: c.update(vocab_size=10**7),
    lambda c: c.update(vocab_size="abc"),
    lambda c: c.update(vocab_size=True),
    lambda c: c.update(max_position_embeddings=10**12, n_positions=10**12),
    lambda c: c.update(max_position_embeddings=0, n_positions=0),
    lambda c: c.update(max_position_embeddings=[8], n_positions=[8]),
    lambda c: c.update(hidden_size=10**6, n_embd=10**6),
    lambda c: c.update(hidden_size="16", n_embd="16"),
    lambda c: c.update(hidden_size=[], n_embd=[]),
    lambda c: c.update(num_attention_heads=0, n_head=0),
    lambda c: c.update(num_attention_heads="2", n_head="2"),
    lambda c: c.update(rms_norm_eps="x", layer_norm_epsilon="x"),
    lambda c: c.update(hidden_act=["silu"], activation_function=["gelu"]),
    lambda c: c.update(model_type=["llama"]),
    lambda c: c.update(model_type="\x1b[2J" * 1000),
    lambda c: c.update(tie_word_embeddings="yes"),
    lambda c: c.clear(),
]


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_a_hostile_config_is_refused_at_once(plain: Path, tmp_path: Path, number: int) -> None:
    folder = shutil.copytree(plain, tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    EDITS[number](config)
    (folder / "config.json").write_text(json.dumps(config))
    begin = time.monotonic()
    with pytest.raises(CheckpointError):
        read_model(str(folder))
    assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize(
    "edit",
    [{"rope_parameters": [1]}, {"rope_theta": "x", "rope_parameters": None}, {"rope_scaling": 3}],
)
def test_hostile_rotations_are_refused(tmp_path: Path, edit: dict[str, Any]) -> None:
    folder = write(tmp_path, 1)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | edit))
    with pytest.raises(CheckpointError):
        read_model(str(folder))


def test_a_deep_config_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "plain")
    (folder / "config.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(CheckpointError, match="deeper than 64 levels"):
        read_model(str(folder))


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64, torch.bool])
def test_weights_that_are_no_real_numbers_are_refused(
    plain: Path, tmp_path: Path, kind: torch.dtype
) -> None:
    folder = shutil.copytree(plain, tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    last = max(tensors)
    tensors[last] = tensors[last].to(kind)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"{re.escape(last)} is of [A-Z0-9]+; rule: one of F32"
    ):
        read_model(str(folder))


def mutated(content: Any, rng: random.Random) -> Any:
    """The same JSON with one value, somewhere, replaced or left out."""
    copy = json.loads(json.dumps(content))
    at = copy
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(keys)
        inner = at[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
            at = inner
        elif rng.random() < 0.2:
            del at[key]
            return copy
        else:
            at[key] = rng.choice(JUNK)
            return copy


def test_mutated_states_and_configs_never_end_in_a_traceback(
    steps: Path, plain: Path, tmp_path: Path
) -> None:
    rng = random.Random(5)
    run = shutil.copytree(steps, tmp_path / "run")
    state = json.loads((run / "step-00000200/state.json").read_text())
    folder = shutil.copytree(plain, tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    refused = 0
    for _ in range(150):
        sign(run / "step-00000200", "state.json", json.dumps(mutated(state, rng)).encode())
        (folder / "config.json").write_text(json.dumps(mutated(config, rng)))
        for read in (lambda: verify_state(run / "step-00000200"), lambda: read_model(str(folder))):
            begin = time.monotonic()
            try:
                read()
            except CheckpointError:
                refused += 1
            assert time.monotonic() - begin < SECONDS
    assert refused > 50


def test_a_cursor_behind_the_end_of_its_document_is_refused() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    document = Document({"pass": 0, "block": 0}, 0, "a", 0, [], tokens)
    assert len(ConcatPacker(4, offset=1).pack([document], 0)) == 2
    with pytest.raises(CheckpointError, match="stands at token 10 of a document of 10"):
        ConcatPacker(4, offset=10).pack([document], 0)


def test_a_lane_that_is_passes_ahead_is_refused() -> None:
    state = {"pass": 3, "turn": 0, "done": [], "lanes": {"0": {**CURSOR, "pass": 5}}}
    spec: Any = SimpleNamespace(name="text", lanes=1)
    with pytest.raises(CheckpointError, match="a lane of text is passes ahead"):
        Stream(spec, state)


@pytest.mark.parametrize("before", ["x", [1], 1.5, True])
def test_steps_of_another_type_do_not_grow(before: object) -> None:
    assert not _grows(before, 100)
    assert _grows(10, 100)
