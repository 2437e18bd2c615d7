"""Keys and values of the tokens that a model has read, so that each new token costs one forward of
one token.

Shapes: B rows, T new tokens, S tokens attended to, K key/value heads, E head width.
"""

from typing import Any

import torch
from torch import Tensor

from dist_lm.config import ModelConfig
from dist_lm.model.layers import compute_dtype


class KVCache:
    """The keys and values that a forward appends to and attends over.

    Rows of different lengths are padded on the left. A static cache attends over its whole capacity
    through a mask, so that shapes never change under torch.compile; otherwise slices grow with the
    text, and rows without padding need no mask. `GPT.new_cache` makes one.
    """

    def __init__(
        self,
        config: ModelConfig,
        weight: Tensor,
        batch: int,
        capacity: int,
        pad_B: Tensor | None,
        static: bool,
    ):
        """Room for `capacity` tokens a row, in the type that products with `weight` have."""
        head_width = config.width // config.heads
        shape = (batch, config.kv_heads, capacity, head_width)
        dtype = compute_dtype(weight)
        # One tensor (B, K, capacity, E) a layer.
        self.keys = [weight.new_zeros(shape, dtype=dtype) for _ in range(config.layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.pad_B = pad_B  # tokens of padding at the left of each row; None: nowhere
        self.static = static
        self.capacity = capacity
        # Tokens held, padding included. A tensor if static: torch.compile would trace again for
        # each new int.
        self.length: Any = 0
        if static:
            self.length = torch.zeros((), dtype=torch.long, device=weight.device)

    def positions_and_mask(self, index_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions (T, or B and T) and the attention mask of the next tokens.

        `index_T` counts the new tokens from 0.
        """
        T = len(index_T)
        index_T = index_T + self.length
        if self.pad_B is None and not self.static and (T == 1 or self.length == 0):
            return index_T, None
        slots = self.capacity if self.static else self.length + T
        slots_S = torch.arange(slots, device=index_T.device)
        mask = slots_S <= index_T[:, None]
        if self.pad_B is None:
            return index_T, mask
        mask = mask & (slots_S >= self.pad_B[:, None, None])
        # A token of padding sees itself, so that no row of the softmax is empty.
        mask = mask | (slots_S == index_T[:, None])
        positions_BT = (index_T - self.pad_B[:, None]).clamp(min=0)
        return positions_BT, mask[:, None]

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of a layer's next tokens; returns all that attention is over."""
        keys = self.keys[layer]
        values = self.values[layer]
        T = k_BKTE.shape[2]
        if self.static:
            slots_T = torch.arange(T, device=keys.device) + self.length
            keys.index_copy_(2, slots_T, k_BKTE)
            values.index_copy_(2, slots_T, v_BKTE)
            return keys, values
        end = self.length + T
        keys[:, :, self.length : end] = k_BKTE
        values[:, :, self.length : end] = v_BKTE
        return keys[:, :, :end], values[:, :, :end]
