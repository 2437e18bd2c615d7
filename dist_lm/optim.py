"""Optimizers by name, which parameters decay, and the learning rate as a function of the step.

Invariant: an optimizer knows no schedule; the rate arrives through set_lr() before each update. All
that an optimizer remembers lies in optimizer.state[parameter] as tensors, so a checkpoint can hold
it by parameter name, and create_state() brings those tensors into being for it to be loaded into.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dist_lm.config import OptimConfig
from dist_lm.own_optimizers import Group, Lion, Muon

WSD_DECAY = 0.2  # share of a wsd run that decays


# --- the learning rate


def lr_at(optim: OptimConfig, step: int, steps: int) -> float:
    """The rate of update `step` (0-based) in a run of `steps` updates.

    Warm-up: update s has lr * (s + 1) / warmup_steps, so its last one has lr. After it, cosine and
    linear fall from lr at update warmup_steps to min_lr at update `steps`, the one after the last:
    the last update is one notch above min_lr, none is wasted on a rate of 0, and a run of one
    update has lr. wsd stays at lr and falls linearly in the same way over the last 20% of the run.
    inverse_sqrt is lr * sqrt(warmup_steps / (s + 1)), at least min_lr.
    """
    warmup = optim.warmup_steps
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "inverse_sqrt":
        return max(optim.min_lr, optim.lr * math.sqrt(max(warmup, 1) / (step + 1)))
    start = warmup
    if optim.schedule == "wsd":
        start = max(warmup, steps - math.ceil(WSD_DECAY * steps))
    if optim.schedule == "constant" or step <= start:
        return optim.lr
    progress = (step - start) / (steps - start)
    left = 1 - progress
    if optim.schedule == "cosine":
        left = (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr + (optim.lr - optim.min_lr) * left


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# --- optimizers by name


def make_optimizer(model: nn.Module, optim: OptimConfig, precision: str) -> torch.optim.Optimizer:
    """The optimizer of `optim.name` for a bare model (its own parameter names, no wrapper's
    prefix).

    Weight decay is decoupled and scaled by the rate; for sgd it is PyTorch's L2 term in the
    gradient.
    """
    return MAKERS[optim.name](model, optim, precision)


def make_adamw(model: nn.Module, optim: OptimConfig, precision: str) -> torch.optim.Optimizer:
    groups = param_groups(model.named_parameters(), optim.weight_decay)
    # Fused on a CPU too, where it is 3 to 5 times as fast.
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def make_sgd(model: nn.Module, optim: OptimConfig, precision: str) -> torch.optim.Optimizer:
    """Its rate is far larger than AdamW's."""
    groups = param_groups(model.named_parameters(), optim.weight_decay)
    # Not fused: a first step skipped for an fp16 overflow leaves fused momentum uninitialised.
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0])


def make_adafactor(model: nn.Module, optim: OptimConfig, precision: str) -> torch.optim.Optimizer:
    """Its rate is relative to the RMS of each tensor.

    It is at most 1/sqrt(step) (Shazeer & Stern 2018, algorithm 4).
    """
    groups = param_groups(model.named_parameters(), optim.weight_decay)
    return torch.optim.Adafactor(groups, lr=optim.lr)


def make_lion(model: nn.Module, optim: OptimConfig, precision: str) -> torch.optim.Optimizer:
    """Its rate is a third to a tenth of AdamW's."""
    groups = param_groups(model.named_parameters(), optim.weight_decay)
    return Lion(groups, lr=optim.lr, betas=optim.betas)


def make_muon(model: nn.Module, optim: OptimConfig, precision: str) -> torch.optim.Optimizer:
    """Its rate is AdamW's."""
    merged = []
    single = []
    rest = []
    for name, parameter in model.named_parameters():
        if not is_matrix_of_block(name):
            rest.append((name, parameter))
        elif name.endswith(".qkv.weight"):
            merged.append(parameter)
        else:
            single.append(parameter)
    decay = optim.weight_decay
    groups: list[Group] = [
        {"params": merged, "merged_qkv": True, "weight_decay": decay},
        {"params": single, "merged_qkv": False, "weight_decay": decay},
    ]
    groups = [group for group in groups if group["params"]]
    groups += param_groups(rest, decay)
    ns_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return Muon(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, ns_dtype=ns_dtype)


MAKERS: dict[str, Callable[[nn.Module, OptimConfig, str], torch.optim.Optimizer]] = {
    "adamw": make_adamw,
    "sgd": make_sgd,
    "adafactor": make_adafactor,
    "lion": make_lion,
    "muon": make_muon,
}


# --- which parameter is treated how: by name alone, because under ZeRO-3 it does not show its shape


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[Group]:
    """Two groups: matrices decay; norms, biases and both embeddings (embed, positions) do not."""
    decaying = []
    spared = []
    for name, parameter in named_parameters:
        if decays(name):
            decaying.append(parameter)
        else:
            spared.append(parameter)
    groups: list[Group] = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def decays(parameter: str) -> bool:
    is_vector = "norm" in parameter or parameter.endswith(".bias")
    is_embedding = parameter.startswith(("embed.", "positions."))
    return not is_vector and not is_embedding


def is_matrix_of_block(parameter: str) -> bool:
    """Whether Muon orthogonalises its updates."""
    is_matrix = parameter.endswith(".weight") and "norm" not in parameter
    return is_matrix and parameter.startswith("blocks.")


# --- what an optimizer remembers


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring every state tensor into being, zero as before the first update, without moving a
    weight.

    It makes one update at rate 0 with zero gradients, whatever the optimizer. Gradients and rates
    are put back.
    """
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    has_state = any(optimizer.state.get(p) for p in parameters)
    assert not has_state, "create_state() would erase this optimizer's state"
    grads = [p.grad for p in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]

    for p in parameters:
        p.grad = torch.zeros_like(p)
    set_lr(optimizer, 0.0)
    optimizer.step()

    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
        for tensor in optimizer.state[p].values():
            tensor.zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def moments(name: str, parameter: str) -> int:
    """The number of tensors of a parameter's own shape that the optimizer `name` keeps for it.

    Those of adafactor are smaller and do not count.
    """
    if name == "muon":
        return 1 if is_matrix_of_block(parameter) else 2
    return {"adamw": 2, "sgd": 1, "lion": 1, "adafactor": 0}[name]
