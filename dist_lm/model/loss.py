"""The cross-entropy of a vocabulary too large for its logits to exist all at once.

Shapes: N = B*T rows, C rows of a chunk of them, D width, V vocabulary (padded).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lm.config import NO_TARGET
from dist_lm.model.layers import compute_dtype

# How many logits the loss makes at once, by the type of device.
LOGITS_AT_A_TIME = {"cpu": 2**24, "cuda": 2**28}


def cross_entropy_sum(
    x_ND: Tensor,
    weight_VD: Tensor,
    padding_V: Tensor | None,
    targets_N: Tensor,
    logits_at_a_time: int = 2**24,
) -> Tensor:
    """Sum of -log softmax(x W' + padding)[target] over targets other than -100, in fp32."""
    chunks = -(-len(x_ND) * len(weight_VD) // logits_at_a_time)
    if chunks == 1:
        logits_NV = F.linear(x_ND, weight_VD, padding_V).float()
        return F.cross_entropy(logits_NV, targets_N, ignore_index=NO_TARGET, reduction="sum")
    rows = -(-len(x_ND) // chunks)
    loss: Tensor = ChunkedCrossEntropySum.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, padding_V, targets_N, rows, torch.is_grad_enabled()
    )
    return loss


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
    ) -> Tensor:
        dtype = compute_dtype(x_ND)
        w_VD = weight_VD.to(dtype)
        if padding_V is not None:
            padding_V = padding_V.to(dtype)
        # A row without a target is blanked at both ends, where it is D wide, so the logits between
        # need no mask.
        counts_N1 = (targets_N != NO_TARGET)[:, None]
        masked_ND = (x_ND * counts_N1).to(dtype)
        labels_N1 = targets_N[:, None] * counts_N1
        loss = torch.zeros((), device=x_ND.device)
        if grad:
            grad_x_ND = torch.empty_like(x_ND)
            grad_w_VD = torch.zeros_like(weight_VD)
            minus_one_C1 = torch.full((rows, 1), -1.0, device=x_ND.device)
        for start in range(0, len(x_ND), rows):
            chunk = slice(start, start + rows)
            x_CD = masked_ND[chunk]
            labels_C1 = labels_N1[chunk]
            logp_CV = F.linear(x_CD, w_VD, padding_V).log_softmax(-1, dtype=torch.float)
            loss += F.nll_loss(logp_CV, targets_N[chunk], ignore_index=NO_TARGET, reduction="sum")
            if grad:
                # The gradient of the logits is softmax - one-hot. It takes the place of their
                # log-probabilities.
                minus_one_hot = minus_one_C1[: len(x_CD)]
                grad_CV = logp_CV.exp_().scatter_add_(1, labels_C1, minus_one_hot).to(dtype)
                grad_x_ND[chunk] = grad_CV @ w_VD
                if dtype == grad_w_VD.dtype:
                    grad_w_VD.addmm_(grad_CV.T, x_CD)
                else:
                    grad_w_VD += grad_CV.T @ x_CD
        if grad:
            ctx.save_for_backward(grad_x_ND.mul_(counts_N1), grad_w_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Scale the gradients in place, which is why a second backward is refused."""
        grad_loss = grads[0]
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        return grad_x_ND.mul_(grad_loss), grad_w_VD.mul_(grad_loss), None, None, None, None
