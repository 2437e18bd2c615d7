"""The cross-entropy of a vocabulary too large for its logits to exist all at once.

Shapes: N = B*T rows, C rows of a chunk of them, D width, V vocabulary (padded).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lm.arithmetic import ceil_div
from dist_lm.config import NO_TARGET
from dist_lm.model.layers import compute_dtype

# How many logits the loss makes at once, by the type of device. On CPUs 24 MB of them instead of 64
# took 1.06 times as long at V = 50,304 (benchmarks/claims/training_step.py): each chunk adds to the
# whole gradient of the weights.
LOGITS_AT_A_TIME = {"cpu": 2**24, "cuda": 2**28}

# Takes the logits of a chunk, their targets and whether gradients are wanted. Returns the sum of
# the losses, and the gradient of the logits in their own type.
LossOfChunk = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def cross_entropy_sum(
    x_ND: Tensor,
    weight_VD: Tensor,
    padding_V: Tensor | None,
    targets_N: Tensor,
    logits_at_a_time: int = 2**24,
    compiled: LossOfChunk | None = None,
) -> Tensor:
    """Sum of -log softmax(x W' + padding)[target] over targets other than -100, in fp32.

    `compiled` is what torch.compile made of loss_in_one_pass().
    """
    chunks = ceil_div(len(x_ND) * len(weight_VD), logits_at_a_time)
    loss_of_chunk: LossOfChunk = loss_by_kernels
    if compiled:
        loss_of_chunk = compiled
        chunks = equal_chunks(len(x_ND), chunks)
    elif chunks == 1:
        logits_NV = F.linear(x_ND, weight_VD, padding_V).float()
        return F.cross_entropy(logits_NV, targets_N, ignore_index=NO_TARGET, reduction="sum")
    rows = ceil_div(len(x_ND), chunks)
    loss: Tensor = ChunkedCrossEntropySum.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, padding_V, targets_N, rows, torch.is_grad_enabled(), loss_of_chunk
    )
    return loss


def equal_chunks(rows: int, at_least: int) -> int:
    """A number of chunks of equal size, for each size is compiled by itself; else `at_least`."""
    for chunks in range(at_least, 2 * at_least + 1):
        if rows % chunks == 0:
            return chunks
    return at_least


def loss_by_kernels(
    logits_CV: Tensor, targets_C: Tensor, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """By torch's own kernels, one after another."""
    logp_CV = logits_CV.log_softmax(-1, dtype=torch.float)
    loss = F.nll_loss(logp_CV, targets_C, ignore_index=NO_TARGET, reduction="sum")
    if not grad:
        return loss, None
    # The gradient of the logits is softmax - one-hot. It takes the place of their
    # log-probabilities.
    minus_one_C1 = logp_CV.new_full((len(logp_CV), 1), -1.0)
    grad_CV = logp_CV.exp_().scatter_add_(1, targets_C.clamp(min=0)[:, None], minus_one_C1)
    return loss, grad_CV.to(logits_CV.dtype)


def loss_in_one_pass(
    logits_CV: Tensor, targets_C: Tensor, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The same, written so that a compiler reads the logits twice and writes the gradient once.

    Comparing each column with the label can be a part of one kernel; scattering cannot.
    """
    logits_CV32 = logits_CV.float()
    log_sums_C1 = logits_CV32.logsumexp(-1, keepdim=True)
    labels_C1 = targets_C.clamp(min=0)[:, None]
    losses_C1 = log_sums_C1 - logits_CV32.gather(-1, labels_C1)
    loss = (losses_C1 * (targets_C != NO_TARGET)[:, None]).sum()
    if not grad:
        return loss, None
    is_label_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == labels_C1
    grad_CV = (logits_CV32 - log_sums_C1).exp() - is_label_CV.float()
    return loss, grad_CV.to(logits_CV.dtype)


class ChunkedCrossEntropySum(torch.autograd.Function):
    """Makes the logits of a few rows at a time and their gradients at once, so N x V logits never
    exist together.

    As fast as the plain loss or faster, in half its memory at V = 50,304 and N = 2,048. Gradients
    are unscaled until the backward, and summed in the weights' own precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        padding_V: Tensor | None,
        targets_N: Tensor,
        rows: int,
        grad: bool,
        loss_of_chunk: LossOfChunk,
    ) -> Tensor:
        dtype = compute_dtype(x_ND)
        w_VD = weight_VD.to(dtype)
        if padding_V is not None:
            padding_V = padding_V.to(dtype)
        # A row without a target is blanked at both ends, where it is D wide, so the logits between
        # need no mask.
        counts_N1 = (targets_N != NO_TARGET)[:, None]
        masked_ND = (x_ND * counts_N1).to(dtype)
        loss = torch.zeros((), device=x_ND.device)
        if grad:
            grad_x_ND = torch.empty_like(x_ND)
            grad_w_VD = torch.zeros_like(weight_VD)
        for start in range(0, len(x_ND), rows):
            chunk = slice(start, start + rows)
            x_CD = masked_ND[chunk]
            logits_CV = F.linear(x_CD, w_VD, padding_V)
            loss_of_rows, grad_CV = loss_of_chunk(logits_CV, targets_N[chunk], grad)
            loss += loss_of_rows
            if grad_CV is not None:
                grad_x_ND[chunk] = grad_CV @ w_VD
                _add_product(grad_w_VD, grad_CV.T, x_CD)
        if grad:
            ctx.save_for_backward(grad_x_ND.mul_(counts_N1), grad_w_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Scale the gradients in place, which is why a second backward is refused."""
        grad_loss = grads[0]
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        scaled = (grad_x_ND.mul_(grad_loss), grad_w_VD.mul_(grad_loss))
        return *scaled, None, None, None, None, None


def _add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """Add a product to a sum that may have a wider type."""
    if left_VC.dtype == total_VD.dtype:
        total_VD.addmm_(left_VC, right_CD)
    elif total_VD.is_cuda:
        # Its own kernel rounds nothing in between. Only GPUs have it.
        total_VD += torch.mm(left_VC, right_CD, out_dtype=total_VD.dtype)
    else:
        total_VD += left_VC @ right_CD
