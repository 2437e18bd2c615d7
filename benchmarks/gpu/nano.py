"""A plain GPT-2 to compare with: what one writes in an afternoon from the paper and torch's docs.

It follows GPT-2 (Radford et al. 2019): learned positions, norms before each branch, one matrix for
queries, keys and values, tanh GELU, tied embeddings. The training step is the usual one: autocast
in bf16, torch.compile of the whole model, fused AdamW, clipping.

Shapes: B rows, T tokens, D width, H heads, E head width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainGPT(nn.Module):
    """Tokens and targets to the mean cross-entropy."""

    def __init__(self, layers: int, heads: int, width: int, vocabulary: int, length: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList([PlainBlock(heads, width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = self.logits(tokens_BT)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def logits(self, tokens_BT: Tensor) -> Tensor:
        index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.tokens(tokens_BT) + self.positions(index_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV


class PlainBlock(nn.Module):
    """Attention and feed-forward, each on a residual branch."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        hidden = F.gelu(self.up(self.norm2(x_BTD)), approximate="tanh")
        return x_BTD + self.down(hidden)

    def attention(self, x_BTD: Tensor) -> Tensor:
        heads = []
        for part_BTD in self.qkv(x_BTD).chunk(3, dim=-1):
            heads.append(part_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        y_BHTE = F.scaled_dot_product_attention(*heads, is_causal=True)
        out_BTD: Tensor = self.out(y_BHTE.transpose(1, 2).flatten(2))
        return out_BTD


# Our names of parameters, and those above.
NAMES = {
    "embed.": "tokens.",
    "positions.": "positions.",
    ".attn.qkv.": ".qkv.",
    ".attn.out.": ".out.",
    ".ffn.up.": ".up.",
    ".ffn.down.": ".down.",
}


@torch.no_grad()
def copy_weights(ours: nn.Module, plain: PlainGPT) -> None:
    """Give the plain model the weights of ours, so that both must have one loss."""
    weights = dict(plain.named_parameters())
    for name, weight in ours.named_parameters():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        weights[name].copy_(weight)
