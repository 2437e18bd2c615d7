"""Checkpoints: whole or not there, damage is seen, what must stay stays, and the files are what they say."""

import itertools
import json
import math
import os
import queue
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_lm import checkpoint, hf
from dist_lm.checkpoint import (
    Held,
    Saver,
    newest_valid,
    prune,
    read_model,
    restore,
    set_aside_newer,
    step_folders,
    verify,
)
from dist_lm.config import ModelConfig, OptimConfig, UserError
from dist_lm.model import GPT, init_weights
from dist_lm.optim import create_state, make_optimizer
from dist_lm.runtime import Channel
from dist_lm.text import Tokenizer, train_tokenizer
from tests import procs
from tests.conftest import held, write_step

MODEL, SEQ_LEN = ModelConfig(layers=2, heads=2, width=16), 8


@pytest.fixture(scope="module")
def trained() -> tuple[GPT, torch.optim.Optimizer, Tokenizer]:
    return training_of(MODEL)


def training_of(config: ModelConfig) -> tuple[GPT, torch.optim.Optimizer, Tokenizer]:
    """A model after two updates of each parameter."""
    tokenizer = train_tokenizer("byte", [])
    model = GPT(config, tokenizer.vocab_size, SEQ_LEN)
    init_weights(model, 1)
    optimizer = make_optimizer(model, OptimConfig(), "fp32")
    for _ in range(2):
        tokens = torch.arange(16).view(2, 8)
        model(tokens, tokens).backward()
        optimizer.step()
    return model, optimizer, tokenizer


def write(run: Path, step: int, trained: Any, val_loss: float | None = None) -> Path:
    model, optimizer, tokenizer = trained
    texts = {
        "config.json": hf.config_json(MODEL, tokenizer.vocab_size, SEQ_LEN, tokenizer.eot),
        "state.json": {"step": step, "val_loss": val_loss},
    }
    return write_step(run, step, model, texts, tokenizer, optimizer)


def test_what_is_saved_is_read_back(trained: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, 3, trained)
    assert sorted(verify(folder)["files"]) == [
        "config.json", "model.safetensors", "optimizer-00001-of-00001.safetensors", "state.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    model, optimizer, _ = trained
    again, tokenizer, found = read_model(str(tmp_path))
    assert found == folder and tokenizer.vocab_size == 257
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    other = make_optimizer(again, OptimConfig(), "fp32")
    create_state(other)
    restore(folder, MODEL, 257, SEQ_LEN, held(again, other), optimizer=True)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert all(torch.equal(optimizer.state[p][key], other.state[q][key]) for key in optimizer.state[p])


def test_files_are_what_safetensors_writes_and_split_the_same_everywhere(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_SMALLEST_FILE", {"model": 4000, "optimizer": 4000})
    folder = write(tmp_path, 3, trained)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    for file in files:
        tensors = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(tensors)
    again, _, _ = read_model(str(folder))
    assert torch.equal(again.embed.weight, trained[0].embed.weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.truncate(f / "model.safetensors", 100), "model.safetensors: has 100 bytes, the manifest says"),
        (lambda f: _flip(f / "model.safetensors"), "model.safetensors: does not match its hash in the manifest"),
        (lambda f: _flip(f / "state.json"), "state.json: does not match its hash in the manifest"),
        (lambda f: (f / "state.json").unlink(), "state.json: is missing or not a regular file"),
        (lambda f: (f / "extra.bin").write_text(""), "extra.bin: is not in the manifest"),
        (lambda f: (f / "manifest.json").write_text(""), "manifest.json: not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: must be a JSON object"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json: is not of format 1"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: No such file or directory"),
        (lambda f: _edit(f, step=4), "manifest.json: belongs to step 4"),
        (lambda f: _edit(f, files={"../x": {}}), "is not in the manifest"),
        (lambda f: _link(f / "state.json"), "state.json: is missing or not a regular file"),
    ],
)
def test_damage_is_seen_and_the_step_before_is_taken(
    trained: Any, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    older, newer = write(tmp_path, 1, trained), write(tmp_path, 2, trained)
    damage(newer)
    with pytest.raises(UserError, match=message) as error:
        verify(newer)
    assert error.value.code == 66
    found, passed_over = newest_valid(tmp_path)
    assert found == older and len(passed_over) == 1 and message in passed_over[0]
    shutil.rmtree(older)
    with pytest.raises(UserError, match=r"holds no valid checkpoint: step-00000002/.*; rule: never restart silently"):
        newest_valid(tmp_path)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


def _edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def _link(file: Path) -> None:
    elsewhere = file.parent.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def test_a_folder_that_is_no_step_is_left_alone(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "step-99").mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    assert newest_valid(tmp_path) == (None, [])


@pytest.mark.slow
def test_nothing_is_there_until_all_is_written(trained: Any, tmp_path: Path) -> None:
    """Die at every file operation of a save: the older checkpoint or the whole new one is found, never a mix."""
    write(tmp_path / "run", 1, trained)
    script = """
import os, sys
from pathlib import Path
import tests.test_checkpoint as t
left = int(sys.argv[2])
def count(event, arguments):
    global left
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree") and armed:
        left -= 1
        if left < 0:
            os._exit(9)
armed = False
trained = t.training_of(t.MODEL)
sys.addaudithook(count)
armed = True
t.write(Path(sys.argv[1]), 2, trained)
os._exit(0)
"""
    finished, points, deaths = False, 0, set()
    while not finished:
        run = tmp_path / f"run-{points}"
        shutil.copytree(tmp_path / "run", run)
        done = procs.run([sys.executable, "-c", script, str(run), str(points)], timeout=60)
        finished, points = done.returncode == 0, points + (1 if points < 4 else 3)
        found, passed_over = newest_valid(run)
        assert found is not None and passed_over == []
        deaths.add(found.name)
        write(run, 3, trained)  # the next save clears what was left over
        assert not list(run.glob(".step-*"))
    assert deaths == {"step-00000001", "step-00000002"} and points > 10


def test_a_full_disk_leaves_the_older_checkpoint(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = write(tmp_path, 1, trained)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "optimizer-00001-of-00001.safetensors")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError) as error:
        write(tmp_path, 2, trained)
    assert str(error.value) == (
        "checkpoint of step 2 was not written: rank 0: No space left on device (optimizer-00001-of-00001.safetensors);"
        " older checkpoints are untouched"
    )
    assert [p.name for p in tmp_path.iterdir()] == [older.name]


def test_what_stays(trained: Any, tmp_path: Path) -> None:
    losses = [3.0, 1.5, 2.0, None, 2.5, 2.2, 2.1, None]
    for step, loss in enumerate(losses, 1):
        write(tmp_path, step, trained, loss)
    prune(tmp_path, keep_last=2, keep_every=3)
    assert [checkpoint.step_of(f) for f in step_folders(tmp_path)] == [2, 3, 6, 7, 8]  # best, every third, the last two


def test_going_back_sets_newer_steps_aside(trained: Any, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, trained)
    said: list[str] = []
    set_aside_newer(tmp_path, tmp_path / "step-00000001", said.append)
    assert [f.name for f in step_folders(tmp_path)] == ["step-00000001"] and len(said) == 2
    assert (tmp_path / "replaced-0-step-00000003").is_dir()


def test_no_model_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither a checkpoint"):
        read_model(str(tmp_path))
    with pytest.raises(UserError, match="no such folder; rule: a run, a step folder"):
        read_model(str(tmp_path / "x"))


def test_a_missing_tensor_is_named(trained: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, 1, trained)
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="the model file lacks"):
        read_model(str(folder))
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "optimizer-00001-of-00001.safetensors").unlink()
    model, optimizer, _ = trained
    with pytest.raises(
        UserError, match=r"step-00000001 lacks embed.weight.exp_avg of the optimizer; rule: resume with"
    ):
        restore(folder, MODEL, 257, SEQ_LEN, held(model, optimizer), optimizer=True)


def test_a_torn_safetensors_file_is_refused(trained: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, 1, trained)
    (folder / "manifest.json").unlink()
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file"):
        read_model(str(folder))


def test_a_checkpoint_is_a_transformers_folder(trained: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write(tmp_path, 1, trained)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("a b\n  c", return_tensors="pt").input_ids
    assert tokens.tolist() == [trained[2].encode("a b\n  c")]
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, trained[0](tokens), atol=1e-5)


def test_only_safetensors_and_json_are_read(trained: Any, tmp_path: Path) -> None:
    """A pickle that would run code lies under every name a loader might touch; it never runs."""
    folder = write(tmp_path, 1, trained)
    (folder / "manifest.json").unlink()
    marker = tmp_path / "marker"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    for name in ("pytorch_model.bin", "model.bin", "optimizer.bin", "random_states_0.pkl", ".metadata", "__0_0.distcp",
                 "custom_checkpoint_0.pkl", "mp_rank_00_model_states.pt", "dl_state_dict.bin", "tok.py"):  # fmt: skip
        (folder / name).write_bytes(payload)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "tok.X"}})
    )
    read_model(str(folder))
    assert not marker.exists()


# --- many ranks


class Messages:
    """What ranks of one process, each a thread, have sent each other."""

    def __init__(self, world: int):
        self.world, self.barrier = world, threading.Barrier(world)
        self.said: list[Any] = [None] * world
        self.mail: dict[tuple[int, int, int], queue.Queue[torch.Tensor]] = {}
        self.lock = threading.Lock()
        self.sent = 0

    def box(self, sender: int, receiver: int, tag: int) -> "queue.Queue[torch.Tensor]":
        with self.lock:
            return self.mail.setdefault((sender, receiver, tag), queue.Queue())


class ThreadChannel:
    """A Channel between threads: the same words, no processes."""

    def __init__(self, rank: int, messages: Messages):
        self.rank, self.world_size, self.messages = rank, messages.world, messages

    def gather(self, value: Any) -> list[Any]:
        self.messages.said[self.rank] = json.loads(json.dumps(value))
        self.messages.barrier.wait(timeout=20)
        said = list(self.messages.said)
        self.messages.barrier.wait(timeout=20)
        return said

    def send(self, tensor: torch.Tensor, to: int, tag: int) -> Any:
        self.messages.sent += tensor.numel()
        self.messages.box(self.rank, to, tag).put(tensor.clone())
        return self

    def wait(self) -> None:
        """What send() returns is over at once."""

    def receive(self, tensor: torch.Tensor, sender: int, tag: int) -> None:
        tensor.copy_(self.messages.box(sender, self.rank, tag).get(timeout=20))


def cut(everything: list[Held], world: int, cuts: random.Random) -> list[list[Held]]:
    """Each parameter cut at random places among the ranks, in any order; some ranks get nothing of it."""
    by_rank: list[list[Held]] = [[] for _ in range(world)]
    for h in everything:
        places = [0, *sorted(cuts.choices(range(h.stop + 1), k=world - 1)), h.stop]
        for rank, (start, stop) in zip(cuts.sample(range(world), world), itertools.pairwise(places), strict=True):
            if stop > start:
                state = {key: value[start:stop] for key, value in h.state.items()}
                by_rank[rank].append(Held(h.name, start, stop, h.weight[start:stop], state, h.extra))
    return by_rank


def save_together(
    run: Path, trained: Any, by_rank: list[list[Held]], step: int = 7, messages: Messages | None = None
) -> tuple[list[Any], int]:
    """Save as many ranks; what each of them raised, or None, and how many elements they sent."""
    model, _, tokenizer = trained
    messages = messages or Messages(len(by_rank))
    texts = {"config.json": json.dumps(hf.config_json(model.config, tokenizer.vocab_size, SEQ_LEN, tokenizer.eot)),
             "state.json": "{}"}  # fmt: skip
    outcome: list[Any] = [None] * len(by_rank)

    def work(rank: int) -> None:
        saver = Saver(run, ThreadChannel(rank, messages))
        try:
            saver.begin(step, model.config, tokenizer.vocab_size, SEQ_LEN, lambda: by_rank[rank], texts, tokenizer)
            saver.finish()
        except UserError as error:
            outcome[rank] = str(error)

    ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(len(by_rank))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=30)
    return outcome, messages.sent


@pytest.mark.parametrize("family", ["llama", "gpt2", "ours"])
@pytest.mark.parametrize("world", [2, 5])
def test_files_are_the_same_bytes_however_what_they_hold_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, world: int
) -> None:
    """Held whole by each rank, or in slices: the same files, hashes included; and read back in slices again."""
    monkeypatch.setattr(checkpoint, "_SMALLEST_FILE", {"model": 3000, "optimizer": 3000})
    gpt2 = {"positions": "learned", "norm": "layernorm", "activation": "gelu"}  # biases are constants of the file
    model_config = MODEL.model_copy(update={"llama": {"kv_heads": 1}, "gpt2": gpt2, "ours": {"qk_norm": True}}[family])
    model, optimizer, tokenizer = some = training_of(model_config)
    everything = held(model, optimizer)
    assert save_together(tmp_path / "alone", some, [everything]) == ([None], 0)
    assert save_together(tmp_path / "replicas", some, [everything] * world) == ([None] * world, 0)  # all have all
    outcome, sent = save_together(tmp_path / "slices", some, cut(everything, world, random.Random(world)))
    assert outcome == [None] * world and sent > 0
    manifests = [verify(tmp_path / run / "step-00000007") for run in ("alone", "replicas", "slices")]
    assert manifests[0] == manifests[1] == manifests[2]
    assert len(manifests[0]["files"]) > 8
    for h in itertools.chain(*cut(everything, 3, random.Random(1))):
        state = {key: torch.full_like(value, 7.0) for key, value in h.state.items()}
        extra = {key: torch.full_like(value, 7.0) for key, value in h.extra.items()}
        blank = Held(h.name, h.start, h.stop, torch.full_like(h.weight, 7.0), state, extra)
        restore(tmp_path / "slices/step-00000007", model_config, tokenizer.vocab_size, SEQ_LEN, [blank], optimizer=True)
        columns = math.prod(dict(model.named_parameters())[h.name].shape[1:])
        unpadded = (257 if h.name in ("embed.weight", "head.weight") else 10**9) * columns
        kept = slice(0, max(0, unpadded - h.start))  # what pads the vocabulary is not saved
        for ours, theirs in [(blank.weight, h.weight), *((state[key], h.state[key]) for key in state)]:
            assert torch.equal(ours[kept], theirs[kept])
        assert all(torch.equal(extra[key], h.extra[key]) for key in extra) and extra


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_writing_evenly(trained: Any, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setattr(checkpoint, "_SMALLEST_FILE", {"model": 3000, "optimizer": 1000})
    model, optimizer, _ = trained
    index = [[h.name, h.start, h.stop, sorted(h.state), {}] for h in held(model, optimizer)]
    items = checkpoint._plan(MODEL, 257, SEQ_LEN, [index] * world)
    loads = [sum(item.entry.bytes for item in items if item.writer == rank) for rank in range(world)]
    assert max(loads) <= sum(loads) / world + max(item.entry.bytes for item in items)
    assert min(loads) > 0.7 * sum(loads) / world


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (lambda path: OSError(28, "No space left on device", str(path)), "No space left on device (model.safetensors)"),
        (lambda path: RuntimeError("not enough memory"), "not enough memory (.step-00000007.tmp)"),
    ],
    ids=["disk", "memory"],
)
def test_one_rank_that_cannot_write_fails_all_and_the_next_save_is_whole(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[[Path], Exception], message: str
) -> None:
    write_all = checkpoint.write_tensors

    def full(path: Path, *args: Any) -> Any:
        if path.name.startswith("model"):
            raise failure(path)
        return write_all(path, *args)

    model, optimizer, tokenizer = some = training_of(MODEL)
    older = write(tmp_path, 1, trained)
    messages, slices = Messages(3), cut(held(model, optimizer), 3, random.Random(3))
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "write_tensors", full)
        said, _ = save_together(tmp_path, some, slices, messages=messages)
    assert len(set(said)) == 1 and message in said[0]
    assert [p.name for p in tmp_path.iterdir()] == [older.name]
    for parameter in model.parameters():  # what was sent for the failed file must not end up in the next
        parameter.data += 1
    assert save_together(tmp_path, some, slices, step=8, messages=messages)[0] == [None] * 3
    again = checkpoint.read_weights(tmp_path / "step-00000008", MODEL, tokenizer.vocab_size, SEQ_LEN)
    assert all(torch.equal(again[name][:16], p[:16]) for name, p in model.named_parameters())


def test_a_failed_write_is_raised_at_the_next_look(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, tokenizer = trained
    saver = Saver(tmp_path, Channel(0, 1, torch.device("cpu")))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    saver.begin(1, MODEL, tokenizer.vocab_size, SEQ_LEN, lambda: held(model, optimizer), {}, tokenizer)
    deadline = time.monotonic() + 20
    with pytest.raises(UserError, match="checkpoint of step 1 was not written: rank 0: Read-only file system"):
        while time.monotonic() < deadline:
            saver.poll()
            time.sleep(0.01)
    saver.poll()  # said once
