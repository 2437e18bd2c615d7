"""The layers that blocks are built of: matrices, tables, norms, and the type they compute in."""

import torch
from torch import Tensor, nn

from dist_lm.config import ModelConfig


class Linear(nn.Linear):
    """A matrix of zeros, until init_weights or a checkpoint fills it.

    torch's own random values would cost seconds and be thrown away.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table of zeros, for the same reason."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def make_norm(config: ModelConfig) -> nn.Module:
    """A norm over the residual stream."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.width, eps=config.norm_eps)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products of x run in: autocast's, or that of x itself."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
