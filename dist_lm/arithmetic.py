"""Arithmetic of whole numbers that Python has no name for."""

from collections.abc import Mapping


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up. math.ceil(a / b) is wrong where a float cannot hold it."""
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below the number."""
    return ceil_div(number, multiple) * multiple


def share_out(sizes: Mapping[str, int], takers: int) -> dict[str, int]:
    """Who takes what, by name: the largest first, each to the one with the least so far.

    Everybody computes the same from the same sizes.
    """
    loads = [0] * takers
    chosen = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        taker = loads.index(min(loads))
        chosen[name] = taker
        loads[taker] += sizes[name]
    return chosen
