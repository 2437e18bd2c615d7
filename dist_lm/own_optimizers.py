"""Lion and Muon, the optimizers that torch lacks or has in a form that does not serve here.

Muon also works where each rank holds only slices of matrices (ZeRO), and where ranks divide whole
ones among them (DDP).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dist_lm.arithmetic import ceil_div

Group = dict[str, Any]  # one of optimizer.param_groups: its parameters and their settings

MUON_MOMENTUM = 0.95
# The quintic iteration of https://kellerjordan.github.io/posts/muon: five rounds bring singular
# values near 1.
NS_ROUNDS = 5
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Elements orthogonalised at once: few kernel launches for small matrices, 64 MB a buffer for any.
NS_BATCH = 2**24


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str) -> Tensor:
    """A state tensor of a parameter, made as zeros at its first use."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if key not in state:
        if key == "step":
            state[key] = torch.zeros((), device=parameter.device)
        else:
            state[key] = torch.zeros_like(parameter)
    return state[key]


def _with_grad(group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a group that have a gradient, and their gradients."""
    params = [p for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    return params, grads


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2: the sign of an interpolated momentum."""

    def __init__(self, groups: list[Group], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr = group["lr"]
            beta1, beta2 = group["betas"]
            params, grads = _with_grad(group)
            if not params:
                continue
            momenta = [_state(self, p, "momentum_buffer") for p in params]
            directions = torch._foreach_lerp(momenta, grads, 1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-lr)
            torch._foreach_lerp_(momenta, grads, 1 - beta2)


# --- Muon. Shapes: N matrices of R rows and C columns


@dataclass(frozen=True)
class MatrixSlice:
    """A rank's slice of a matrix, as it lies in the rank's flat tensor under ZeRO."""

    shape: tuple[int, ...]  # of the whole matrix
    at: int  # the slice's first element in the flat tensor
    lengths: tuple[int, ...]  # elements of the matrix that each rank holds, in rank order

    def of(self, flat: Tensor, rank: int) -> Tensor:
        return flat[self.at : self.at + self.lengths[rank]]


@dataclass(frozen=True)
class MatrixSharing:
    """How ranks that hold slices of matrices come to whole ones."""

    rank: int
    # By flat tensor, the same matrices in the same order on all ranks.
    slices: Mapping[Tensor, list[MatrixSlice]]
    # Takes a part for each rank and how many elements come from each; returns what came.
    exchange: Callable[[list[Tensor], list[int]], list[Tensor]]


@dataclass(frozen=True)
class MatrixDivision:
    """How ranks that hold the same whole matrices divide the work on them."""

    rank: int
    world_size: int
    # Takes a tensor of equal shape on all ranks; returns those of all ranks, one after another.
    collect: Callable[[Tensor], Tensor]


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `merged_qkv` (the matrices inside blocks), AdamW for the others.

    All groups have one rate. A merged qkv matrix is orthogonalised as its three parts.

    This is a class of our own because torch.optim.Muon iterates in bf16 only (slow on CPUs, not
    reproducible across them) and knows neither merged matrices nor the rest of a model.

    Under ZeRO a group is one flat tensor that holds slices of matrices. There each matrix is
    collected by one rank, orthogonalised, and its update handed back; share_matrices() says how.
    Under DDP ranks may divide the matrices; divide_matrices() says how.
    """

    def __init__(
        self,
        groups: list[Group],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        ns_dtype: torch.dtype,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.ns_dtype = ns_dtype  # of the Newton-Schulz iteration
        self.sharing: MatrixSharing | None = None  # None: every matrix is here as a whole
        self.division: MatrixDivision | None = None  # None: this rank works on every matrix

    def share_matrices(
        self,
        rank: int,
        slices: Mapping[Tensor, list[MatrixSlice]],
        exchange: Callable[[list[Tensor], list[int]], list[Tensor]],
    ) -> None:
        """From now on parameters are flat tensors of slices, and step() is a collective."""
        self.sharing = MatrixSharing(rank, slices, exchange)

    def divide_matrices(
        self, rank: int, world_size: int, collect: Callable[[Tensor], Tensor]
    ) -> None:
        """From now on each rank orthogonalises its part of the matrices; step() is a collective."""
        self.division = MatrixDivision(rank, world_size, collect)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "merged_qkv" not in group:
                self._step_adamw(group)
            elif self.sharing is None:
                self._step_whole(group)
            else:
                self._step_sliced(group, self.sharing)

    def _step_whole(self, group: Group) -> None:
        """Muon where this process has whole matrices, those of one shape in batches."""
        params, grads = _with_grad(group)
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for p, grad in zip(params, grads, strict=True):
            momentum = _state(self, p, "momentum_buffer")
            momentum.lerp_(grad, 1 - MUON_MOMENTUM)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            weights = _matrices(group, p)
            grads_of_p = _matrices(group, grad)
            momenta = _matrices(group, momentum)
            for matrix in zip(weights, grads_of_p, momenta, strict=True):
                by_shape.setdefault(matrix[0].shape, []).append(matrix)
        ranks = self.division.world_size if self.division else 1
        for shape, matrices_of_shape in by_shape.items():
            size = max(1, NS_BATCH // shape.numel()) * ranks
            for start in range(0, len(matrices_of_shape), size):
                self._update_whole(matrices_of_shape[start : start + size], group["lr"])

    def _update_whole(self, matrices: list[tuple[Tensor, Tensor, Tensor]], lr: float) -> None:
        """Update a batch of matrices of one shape: weight, gradient and momentum of each."""
        nesterov = [(grad, momentum) for _, grad, momentum in matrices]
        if self.division:
            updates_NRC = self._divided_updates(nesterov, self.division)
        else:
            updates_NRC = muon_update(_nesterov(nesterov), self.ns_dtype)
        for (weight, _, _), update in zip(matrices, updates_NRC, strict=False):
            weight.add_(update, alpha=-lr)

    def _divided_updates(
        self, nesterov: list[tuple[Tensor, Tensor]], division: MatrixDivision
    ) -> Tensor:
        """The updates of a batch, each made by one rank; more follow if ranks do not divide it.

        They travel in the type of the iteration, so nothing is lost. All ranks.
        """
        share = ceil_div(len(nesterov), division.world_size)
        start = division.rank * share
        mine = nesterov[start : start + share]
        # A rank that has fewer matrices than others orthogonalises the last one again.
        mine += [nesterov[-1]] * (share - len(mine))
        made_NRC = newton_schulz(_nesterov(mine), self.ns_dtype).contiguous()
        return scaled_update(division.collect(made_NRC), nesterov[0][0].dtype)

    def _step_sliced(self, group: Group, sharing: MatrixSharing) -> None:
        """Muon where each rank holds slices of matrices. All ranks."""
        params, grads = _with_grad(group)
        for flat, grad in zip(params, grads, strict=True):
            momentum = _state(self, flat, "momentum_buffer")
            momentum.lerp_(grad, 1 - MUON_MOMENTUM)
            flat.mul_(1 - group["lr"] * group["weight_decay"])
            nesterov = grad.lerp(momentum, MUON_MOMENTUM)
            slices = sharing.slices[flat]
            world = len(slices[0].lengths)
            for start in range(0, len(slices), world):
                batch = slices[start : start + world]
                self._update_sliced(group, sharing, flat, nesterov, batch)

    def _update_sliced(
        self,
        group: Group,
        sharing: MatrixSharing,
        flat: Tensor,
        nesterov: Tensor,
        batch: list[MatrixSlice],
    ) -> None:
        """Update as many matrices as there are ranks: rank r orthogonalises the r-th. All ranks.

        The last batch of a group may leave some ranks without a matrix.
        """
        rank = sharing.rank
        world = len(batch[0].lengths)
        parts = [matrix.of(nesterov, rank) for matrix in batch]
        parts += [flat[:0]] * (world - len(batch))
        mine = batch[rank] if rank < len(batch) else None
        lengths = list(mine.lengths) if mine else [0] * world
        update = torch.cat(sharing.exchange(parts, lengths))
        if mine:
            update = self._orthogonalise(group, update.view(mine.shape))
        sent_back = list(torch.split(update, lengths))
        received = sharing.exchange(sent_back, [len(part) for part in parts])
        for matrix, part in zip(batch, received, strict=False):
            matrix.of(flat, rank).add_(part, alpha=-group["lr"])

    def _orthogonalise(self, group: Group, nesterov: Tensor) -> Tensor:
        """The flat update of a whole parameter."""
        updates = []
        for matrix in _matrices(group, nesterov):
            updates.append(muon_update(matrix[None], self.ns_dtype)[0].flatten())
        return torch.cat(updates)

    def _step_adamw(self, group: Group) -> None:
        params, grads = _with_grad(group)
        exp_avgs = [_state(self, p, "exp_avg") for p in params]
        exp_avg_sqs = [_state(self, p, "exp_avg_sq") for p in params]
        steps = [_state(self, p, "step") for p in params]
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

    Scaled by 0.2 sqrt(max(rows, columns)), so that an entry moves about as far as under AdamW and
    its rate and decay carry over (Liu et al. 2025, arXiv 2502.16982, eq. 4). In Keller Jordan's
    units the rate is thus 0.2 sqrt(max(rows, columns)) optim.lr, e.g. 0.0055 for 0.001 at width
    768.
    """
    return scaled_update(newton_schulz(matrices_NRC, ns_dtype), matrices_NRC.dtype)


def scaled_update(orthogonal_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """What muon_update() makes of orthogonal matrices."""
    scale = 0.2 * math.sqrt(max(orthogonal_NRC.shape[-2:]))
    return orthogonal_NRC.to(dtype) * scale


def _nesterov(grads_and_momenta: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The Nesterov momenta of matrices of one shape (N, R, C)."""
    nesterov = [grad.lerp(momentum, MUON_MOMENTUM) for grad, momentum in grads_and_momenta]
    return torch.stack(nesterov)


def newton_schulz(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix of each.

    Singular values end between about 0.7 and 1.2.
    """
    a, b, c = NS_COEFFICIENTS
    is_tall = matrices_NRC.size(-2) > matrices_NRC.size(-1)
    x = matrices_NRC.mT if is_tall else matrices_NRC
    x = x.to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NS_ROUNDS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def qkv_parts(merged: Tensor) -> list[Tensor]:
    """Views of the rows q | k | v.

    Queries are as wide as the residual stream; keys and values share what is left.
    """
    queries = merged.size(1)
    keys = (merged.size(0) - queries) // 2
    return list(torch.split(merged, [queries, keys, keys]))


def _matrices(group: Group, parameter: Tensor) -> list[Tensor]:
    """The matrices that a parameter of the group consists of."""
    return qkv_parts(parameter) if group["merged_qkv"] else [parameter]
