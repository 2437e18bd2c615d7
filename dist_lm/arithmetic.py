"""Arithmetic of whole numbers that Python has no name for."""


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up. math.ceil(a / b) is wrong where a float cannot hold it."""
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below the number."""
    return ceil_div(number, multiple) * multiple
