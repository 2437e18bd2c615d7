"""The rows of one step: filled by the sources, sent to the ranks that train on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dist_lm.data.order import Ints, rank_of, row_of
from dist_lm.data.packing import PackedSequence
from dist_lm.data.provenance import Origin
from dist_lm.errors import UserError

if TYPE_CHECKING:
    from dist_lm.channel import Channel


class _Move(NamedTuple):
    """A sequence between the rank that reads it and the one that trains on it."""

    place: int
    owner: int  # the rank that reads it
    sequence: PackedSequence | None  # None: another rank has read it


class StepRows:
    """A rank's rows of one step, and where the data stands afterwards.

    The ranks take turns of `unit` places of the global batch, as order.py says. A row that no
    source fills stays without targets.
    """

    def __init__(self, count: int, seq_len: int, rank: int = 0, world: int = 1, unit: int = 1):
        self.rank = rank
        self.world = world
        self.unit = unit
        self.tokens = np.zeros((count, seq_len + 1), np.int64)  # inputs, and the last target
        self.targets = np.zeros(count, np.int64)  # how many of a row's tokens are targets
        self.origins: dict[int, Origin] = {}  # by place, of the sequences that this rank has read
        self.end = False  # no rank has a row: the data is used up
        self.after: dict[str, Any] = {}  # where the streams stand, as far as this rank reads them
        self.shares: dict[str, float] = {}  # of a mixture: asked and actual shares, and passes
        # Why this rank could not read some of its rows, which stay without targets. Other ranks do
        # not know it.
        self.failure: UserError | None = None
        self._moves: list[_Move] = []

    def ours(self, places: Ints) -> np.ndarray:
        """A mask of the places that this rank trains on."""
        mask: np.ndarray = rank_of(places, self.world, self.unit) == self.rank
        return mask

    def put(self, places: Ints, tokens: np.ndarray) -> None:
        """Fill places of this rank with whole sequences."""
        rows = row_of(places, self.world, self.unit)
        self.tokens[rows] = tokens
        self.targets[rows] = tokens.shape[1] - 1

    def move(self, place: int, owner: int, sequence: PackedSequence | None) -> None:
        """Note a sequence that the rank `owner` has read. All ranks note the same in one order."""
        self._moves.append(_Move(place, owner, sequence))

    def deliver(self, channel: Channel | None) -> None:
        """Fill the places of all noted sequences, over the network where they must. All ranks."""
        width = self.tokens.shape[1] + 1  # the number of targets comes first
        sent: list[list[np.ndarray]] = [[] for _ in range(self.world)]
        expected: list[list[int]] = [[] for _ in range(self.world)]  # rows, by who reads them
        must_travel = False
        for place, owner, sequence in self._moves:
            trainer = rank_of(place, self.world, self.unit)
            must_travel |= trainer != owner
            if sequence is not None:
                sent[trainer].append(_message(sequence.tokens, width))
            if trainer == self.rank:
                expected[owner].append(row_of(place, self.world, self.unit))
        messages = [np.concatenate(parts) if parts else _NO_TOKENS for parts in sent]
        if must_travel:
            assert channel, "several ranks have a channel"
            lengths = [len(rows) * width for rows in expected]
            messages = _exchange(channel, messages, lengths)
        for rows, received in zip(expected, messages, strict=True):
            for row, message in zip(rows, received.reshape(-1, width), strict=True):
                self.targets[row] = message[0]
                self.tokens[row] = message[1:]


_NO_TOKENS = np.empty(0, np.int64)


def _message(tokens: np.ndarray, width: int) -> np.ndarray:
    """A sequence as it travels: how many targets it has, and its tokens, filled up with zeros."""
    message = np.zeros(width, np.int64)
    message[0] = len(tokens) - 1
    message[1 : 1 + len(tokens)] = tokens
    return message


def _exchange(channel: Channel, messages: list[np.ndarray], lengths: list[int]) -> list[np.ndarray]:
    import torch  # slow, and preparing needs none of it

    tensors = [torch.from_numpy(message) for message in messages]
    return [tensor.numpy() for tensor in channel.exchange(tensors, lengths)]
