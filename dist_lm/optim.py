"""Optimizers by name, which parameters decay, and the learning rate as a function of the step.

Invariant: an optimizer knows neither schedule nor rank; the rate arrives through set_lr() before each update. All that
it remembers lies in optimizer.state[parameter] as tensors, so a checkpoint can hold it by parameter name, and
create_state() brings those tensors into being for it to be loaded into.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dist_lm.config import OptimConfig

WSD_DECAY = 0.2  # share of a wsd run that decays
MUON_MOMENTUM = 0.95
# The quintic iteration of https://kellerjordan.github.io/posts/muon: five rounds bring singular values near 1.
NS_ROUNDS, NS_COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
NS_BATCH = (
    2**24
)  # elements orthogonalised at once: few kernel launches for small matrices, 64 MB a buffer for any size


def lr_at(optim: OptimConfig, step: int, steps: int) -> float:
    """The rate of update `step` (0-based) in a run of `steps` updates.

    Warm-up: update s has lr * (s + 1) / warmup_steps, so its last one has lr. After it, cosine and linear fall from lr
    at update warmup_steps to min_lr at update `steps`, the one after the last: the last update is one notch above
    min_lr, none is wasted on a rate of 0, and a run of one update has lr. wsd stays at lr and falls linearly in the
    same way over the last 20% of the run. inverse_sqrt is lr * sqrt(warmup_steps / (s + 1)), at least min_lr.
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
    left = (1 + math.cos(math.pi * progress)) / 2 if optim.schedule == "cosine" else 1 - progress
    return optim.min_lr + (optim.lr - optim.min_lr) * left


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: matrices decay; norms, biases and both embeddings (embed, positions) do not.

    By name alone, because under ZeRO-3 a parameter does not show its shape.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": wd} for wd in (weight_decay, 0.0)
    ]
    for name, parameter in named_parameters:
        keeps = (
            "norm" in name or name.endswith(".bias") or name.startswith(("embed.", "positions."))
        )
        groups[keeps]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, optim: OptimConfig, precision: str) -> torch.optim.Optimizer:
    """The optimizer of `optim.name` for a bare model (its own parameter names, no wrapper's prefix).

    optim.lr is AdamW's for adamw and muon; lion takes a third to a tenth of it, sgd far more. For adafactor it is
    relative to the RMS of each tensor and at most 1/sqrt(step) (Shazeer & Stern 2018, algorithm 4). Decay is decoupled
    and scaled by the rate, for sgd it is PyTorch's L2 term in the gradient.
    """
    groups, lr, (beta1, _) = (
        param_groups(model.named_parameters(), optim.weight_decay),
        optim.lr,
        optim.betas,
    )
    if optim.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=lr, betas=optim.betas, eps=optim.eps, fused=True
        )  # CPU too: 3-5 x faster
    if (
        optim.name == "sgd"
    ):  # not fused: a first step skipped for an fp16 overflow leaves fused momentum uninitialised
        return torch.optim.SGD(groups, lr=lr, momentum=beta1)
    if optim.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr)
    if optim.name == "lion":
        return Lion(groups, lr=lr, betas=optim.betas)
    blocks = {name: p for name, p in model.named_parameters() if _is_matrix_of_block(name)}
    rest = [(name, p) for name, p in model.named_parameters() if name not in blocks]
    groups = [
        {
            "params": [p for name, p in blocks.items() if name.endswith(".qkv.weight") == merged],
            "merged_qkv": merged,
            "weight_decay": optim.weight_decay,
        }
        for merged in (True, False)
    ]
    groups = [group for group in groups if group["params"]] + param_groups(rest, optim.weight_decay)
    ns_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return Muon(groups, lr, optim.betas, optim.eps, ns_dtype)


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring every state tensor into being, zero as before the first update, without moving a weight.

    One update at rate 0 with zero gradients, whatever the optimizer; gradients and rates are put back.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert not any(optimizer.state.get(p) for p in parameters), (
        "create_state() would erase this optimizer's state"
    )
    grads, rates = [p.grad for p in parameters], [group["lr"] for group in optimizer.param_groups]
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
    """How many tensors of a parameter's own shape the optimizer `name` keeps for it; adafactor's are smaller."""
    return {
        "adamw": 2,
        "sgd": 1,
        "lion": 1,
        "adafactor": 0,
        "muon": 1 if _is_matrix_of_block(parameter) else 2,
    }[name]


def _is_matrix_of_block(parameter: str) -> bool:
    """What Muon works on."""
    return (
        parameter.startswith("blocks.")
        and "norm" not in parameter
        and parameter.endswith(".weight")
    )


# Takes a part for each rank and how much comes from each; returns what came.
Exchange = Callable[[list[Tensor], list[int]], list[Tensor]]


@dataclass(frozen=True)
class MatrixSlice:
    """What a rank's flat tensor holds of a matrix, and how many elements each rank does, in rank order."""

    shape: tuple[int, ...]
    at: int
    lengths: tuple[int, ...]

    def of(self, flat: Tensor, rank: int) -> Tensor:
        return flat[self.at : self.at + self.lengths[rank]]


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2: the sign of an interpolated momentum."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            params, grads = _with_grad(group)
            if not params:
                continue
            momenta = [_state(self, p, "momentum_buffer") for p in params]
            directions = torch._foreach_lerp(momenta, grads, 1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-lr)
            torch._foreach_lerp_(momenta, grads, 1 - beta2)


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `merged_qkv` (the matrices inside blocks), AdamW for the others, at one rate.

    Own class because torch.optim.Muon iterates in bf16 only (slow on CPUs, not reproducible across them) and knows
    neither merged matrices nor the rest of a model. A merged qkv matrix is orthogonalised as its three parts.

    Under ZeRO a group is one flat tensor, in which `slices` says what this rank has of which matrix; then each matrix
    is collected by one rank, orthogonalised there, and the update handed back by the same `exchange`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        ns_dtype: torch.dtype,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.ns_dtype = ns_dtype
        self.rank = 0
        self.slices: dict[Tensor, list[MatrixSlice]] = {}
        self.exchange: Exchange | None = None

    def share_matrices(
        self, rank: int, slices: dict[Tensor, list[MatrixSlice]], exchange: Exchange
    ) -> None:
        """Work on slices of matrices. `slices` names the same matrices in the same order on all ranks."""
        self.rank = rank
        self.slices = slices
        self.exchange = exchange

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            step = (
                self._adamw
                if "merged_qkv" not in group
                else self._muon_sliced
                if self.slices
                else self._muon
            )
            step(group)

    def _muon_sliced(self, group: dict[str, Any]) -> None:
        assert self.exchange, "share_matrices() gives slices and exchange together"
        for flat, grad in zip(*_with_grad(group), strict=True):
            momentum = _state(self, flat, "momentum_buffer")
            momentum.lerp_(grad, 1 - MUON_MOMENTUM)
            flat.mul_(1 - group["lr"] * group["weight_decay"])
            nesterov, slices = grad.lerp(momentum, MUON_MOMENTUM), self.slices[flat]
            world = len(slices[0].lengths)
            for batch in (slices[i : i + world] for i in range(0, len(slices), world)):
                # Rank r works on the batch's r-th matrix; the last batch may leave some ranks without.
                parts = [s.of(nesterov, self.rank) for s in batch] + [flat[:0]] * (
                    world - len(batch)
                )
                mine = batch[self.rank] if self.rank < len(batch) else None
                lengths = list(mine.lengths) if mine else [0] * world
                update = torch.cat(self.exchange(parts, lengths))
                if mine:
                    matrices = _matrices(group, update.view(mine.shape))
                    update = torch.cat(
                        [muon_update(m[None], self.ns_dtype)[0].flatten() for m in matrices]
                    )
                back = self.exchange(
                    list(torch.split(update, lengths)), [len(part) for part in parts]
                )
                for s, part in zip(batch, back, strict=False):
                    s.of(flat, self.rank).add_(part, alpha=-group["lr"])

    def _muon(self, group: dict[str, Any]) -> None:
        params, grads = _with_grad(group)
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for p, grad in zip(params, grads, strict=True):
            momentum = _state(self, p, "momentum_buffer")
            momentum.lerp_(grad, 1 - MUON_MOMENTUM)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            for part in zip(
                *(_matrices(group, whole) for whole in (p, grad, momentum)), strict=True
            ):
                by_shape.setdefault(part[0].shape, []).append(part)
        for shape, parts in by_shape.items():
            size = max(1, NS_BATCH // shape.numel())
            for chunk in (parts[i : i + size] for i in range(0, len(parts), size)):
                nesterov = torch.stack(
                    [grad.lerp(momentum, MUON_MOMENTUM) for _, grad, momentum in chunk]
                )
                for (weight, _, _), update in zip(
                    chunk, muon_update(nesterov, self.ns_dtype), strict=True
                ):
                    weight.add_(update, alpha=-group["lr"])

    def _adamw(self, group: dict[str, Any]) -> None:
        params, grads = _with_grad(group)
        exp_avgs, exp_avg_sqs, steps = (
            [_state(self, p, key) for p in params] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def muon_update(matrices_NRC: Tensor, ns_dtype: torch.dtype) -> Tensor:
    """What Muon subtracts, times the rate, for each (momentum) matrix: a pure function of it.

    Scaled by 0.2 sqrt(max(rows, columns)), so that an entry moves about as far as under AdamW and its rate and decay
    carry over (Liu et al. 2025, arXiv 2502.16982, eq. 4). In Keller Jordan's units the rate is thus
    0.2 sqrt(max(rows, columns)) optim.lr, e.g. 0.0055 for 0.001 at width 768.
    """
    scale = 0.2 * math.sqrt(max(matrices_NRC.shape[-2:]))
    return newton_schulz(matrices_NRC, ns_dtype).to(matrices_NRC.dtype) * scale


def newton_schulz(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix of each, roughly: singular values end between about 0.7 and 1.2."""
    a, b, c = NS_COEFFICIENTS
    tall = matrices_NRC.size(-2) > matrices_NRC.size(-1)
    x = (matrices_NRC.mT if tall else matrices_NRC).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NS_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def qkv_parts(merged: Tensor) -> list[Tensor]:
    """Views of the rows q | k | v. Queries are as wide as the stream, keys and values share what is left."""
    queries = merged.size(1)
    return list(torch.split(merged, [queries] + [(merged.size(0) - queries) // 2] * 2))


def _matrices(group: dict[str, Any], parameter: Tensor) -> list[Tensor]:
    return qkv_parts(parameter) if group["merged_qkv"] else [parameter]


def _with_grad(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    params = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params]


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str) -> Tensor:
    state: dict[str, Tensor] = optimizer.state[parameter]
    if key not in state:
        state[key] = (
            torch.zeros((), device=parameter.device)
            if key == "step"
            else torch.zeros_like(parameter)
        )
    return state[key]
