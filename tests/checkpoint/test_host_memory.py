"""The memory that checkpoints are copied into: locked for a GPU, made ahead, used again."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dist_lm.channel import Channel
from dist_lm.checkpoint.host_memory import HostMemory
from dist_lm.checkpoint.save import Saver
from dist_lm.config import ModelConfig, ModelSpec, OptimConfig
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.optim import create_state, make_optimizer
from tests.conftest import owned


class Cuda:
    """CUDA's runtime, as far as it is asked here. `error` is what locking pages answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0):
        self.error = error
        self.locked: dict[int, int] = {}  # size by address
        self.threads: list[str] = []
        runtime = SimpleNamespace(cudaHostRegister=self.lock, cudaHostUnregister=self.unlock)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "set_device", self.use)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def use(self, device: int) -> None:
        self.threads.append(f"{threading.current_thread().name} on {device}")

    def lock(self, address: int, size: int, flags: int) -> int:
        time.sleep(0.1)
        if not self.error:
            self.locked[address] = size
        return self.error

    def unlock(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_without_a_gpu_nothing_is_locked() -> None:
    memory = HostMemory()
    memory.of(100).fill_(1.0)
    again = memory.of(50)
    assert again.tolist() == [1.0] * 50  # the same memory
    assert memory.of(200).shape == (200,)


def test_pages_are_locked_and_unlocked_before_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly as many as are needed."""
    cuda = Cuda(monkeypatch)
    memory = HostMemory()
    first = memory.of(100)
    assert cuda.locked == {first.data_ptr(): 400}
    larger = memory.of(101)
    assert cuda.locked == {larger.data_ptr(): 404}
    memory.of(20)
    assert cuda.locked == {larger.data_ptr(): 404}


def test_memory_that_cannot_be_locked_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, error=2)
    memory = HostMemory()
    assert memory.of(100).shape == (100,)
    assert memory.of(200).shape == (200,)
    assert cuda.locked == {}


def test_a_saver_makes_its_memory_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread of its own, on this rank's GPU, as large as the first checkpoint needs it."""
    tokenizer = train_tokenizer("byte", [])
    spec = ModelSpec(ModelConfig(layers=1, heads=2, width=16), tokenizer.vocab_size, 8)
    model = GPT(spec)
    init_weights(model, 1)
    optimizer = make_optimizer(model, OptimConfig(), "fp32")
    create_state(optimizer)
    saver = Saver(tmp_path, Channel(0, 1, torch.device("cpu")))
    cuda = Cuda(monkeypatch)
    saver.make_ready(spec, lambda: owned(model, optimizer), make_memory=True)
    assert cuda.locked == {}  # it takes a while
    saver.begin(1, spec, lambda: owned(model, optimizer), {"state.json": "{}"}, tokenizer)
    assert cuda.threads == ["host memory on 3"]
    assert len(cuda.locked) == 1  # the first checkpoint has made no other
    saver.finish()
    assert load_file(tmp_path / "step-00000001/model.safetensors")
