"""The memory that one forward and backward takes beside weights, gradients and optimizer.

The model's own code runs on fake tensors, which have shapes but no memory, so the figures follow
any setting. Blocks and rows are alike: runs of one and two of each give those of any number.
"""

import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lm.config import Config, ModelConfig, ModelSpec
from dist_lm.model.gpt import GPT

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LiveBytes(NamedTuple):
    """Bytes at the moments of one forward and backward."""

    activations: float  # when the blocks have been run forward
    loss: float  # most while the loss is made, above them
    blocks: float  # most in the blocks' backward
    end: float  # most in the embedding's backward, when all else has gone


class FakeRun(NamedTuple):
    """The bytes that one run on fake tensors has counted."""

    forward: float  # bytes that are left when the blocks have been run forward
    loss: float  # most until the loss's backward is over
    blocks: float  # most in the blocks' backward
    end: float  # most in the embedding's backward


def live_bytes(
    config: Config, vocab_size: int, micro_batch: int, slices: bool, on_gpu: bool
) -> LiveBytes:
    """Bytes of a micro-batch. `slices`: under ZeRO-3, where each process has slices of weights."""
    model = config.model

    def run(layers: int, rows: int) -> FakeRun:
        return run_fake(
            model,
            layers,
            vocab_size,
            rows,
            length=config.data.seq_len,
            document_mask=config.data.document_mask,
            precision=config.run.precision,
            activation_checkpointing=config.run.activation_checkpointing,
            slices=slices,
            on_gpu=on_gpu,
        )

    more_layers = model.layers - 1
    more_rows = micro_batch - 1
    small = run(1, 1)
    wide = run(1, 2)
    deep = run(2, 1)
    both = run(2, 2)

    def extend(one: float, of_rows: float, of_layers: float, of_both: float) -> float:
        """Further layers and rows each cost the same, whatever the others do."""
        by_layers = more_layers * (of_layers - one)
        by_rows = more_rows * (of_rows - one)
        by_both = more_layers * more_rows * (of_both - of_layers - of_rows + one)
        return one + by_layers + by_rows + by_both

    # The loss and the embedding do not depend on the blocks, so no block is run for them.
    bare = run(0, micro_batch)
    return LiveBytes(
        activations=extend(small.forward, wide.forward, deep.forward, both.forward),
        loss=max(bare.loss - bare.forward, 0.0),
        blocks=extend(small.blocks, wide.blocks, deep.blocks, both.blocks),
        end=bare.end,
    )


@lru_cache(maxsize=4096)
def run_fake(
    config: ModelConfig,
    layers: int,
    vocab_size: int,
    rows: int,
    length: int,
    document_mask: bool,
    precision: str,
    activation_checkpointing: bool,
    slices: bool,
    on_gpu: bool,
) -> FakeRun:
    """Count one forward and backward of a model with that number of layers."""
    with FakeTensorMode():
        spec = ModelSpec(config.model_copy(update={"layers": layers}), vocab_size, length)
        model = _fake_model(spec, activation_checkpointing, on_gpu)
        counter = MemoryCounter([*model.parameters(), *model.buffers()])
        hooks = _mark_phases(model, counter)
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        dtype = DTYPES.get(precision, torch.float32)
        # Under ZeRO-3 the runtime keeps no cast weights beside those that the backward needs.
        autocast = torch.autocast(
            "cpu", dtype, enabled=dtype != torch.float32, cache_enabled=not slices
        )
        with counter, autocast:
            loss = model(
                tokens,
                tokens,
                dropout_keys_B=tokens[:, 0] if config.dropout else None,
                segments_BT=tokens if document_mask else None,
            )
            for hook in hooks:  # recomputing a block would call them again
                hook.remove()
            with torch.autocast("cpu", enabled=False):
                loss.backward()
    return FakeRun(
        forward=counter.left[0],
        loss=counter.seen[1],
        blocks=counter.seen[2] if layers else 0.0,
        end=counter.most,
    )


def _fake_model(spec: ModelSpec, activation_checkpointing: bool, on_gpu: bool) -> GPT:
    """A model that forgets its gradients: the strategy decides where they go, see memory.py."""
    model = GPT(spec, activation_checkpointing)
    model.device_type = "cuda" if on_gpu else "cpu"
    for parameter in model.parameters():
        add_hook: Any = parameter.register_post_accumulate_grad_hook
        add_hook(_drop_gradient)
    return model


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _mark_phases(model: GPT, counter: "MemoryCounter") -> list[Any]:
    """Let a phase end where the blocks have been run, where the loss's backward is over, and where
    the blocks' is. Returns the hooks of the forward."""

    def first_begins(block: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].register_hook(counter.end_phase)  # type: ignore[no-untyped-call]  # blocks

    def last_ends(block: torch.nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        counter.end_phase()
        out.register_hook(counter.end_phase)  # type: ignore[no-untyped-call]  # the loss's backward

    if not len(model.blocks):
        return [model.embed.register_forward_hook(last_ends)]
    return [
        model.blocks[0].register_forward_pre_hook(first_begins),
        model.blocks[-1].register_forward_hook(last_ends),
    ]


class MemoryCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside, until they are freed."""

    def __init__(self, known: list[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0  # bytes that are there
        self.most = 0  # of them in the phase
        self.seen: list[int] = []  # `most` of each phase that has ended
        self.left: list[int] = []  # `now` at the end of each
        # Storages by id. The given ones are kept, so that no other one gets their id.
        storages = [tensor.untyped_storage() for tensor in known]
        self.known: dict[int, Any] = {id(storage): storage for storage in storages}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if id(storage) in self.known:
            return
        self.known[id(storage)] = None
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, id(storage), storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.now -= size

    def end_phase(self, *_: Any) -> None:
        """Note the figures of a phase, and begin the next. A hook may call it with arguments."""
        self.seen.append(self.most)
        self.left.append(self.now)
        self.most = self.now
