"""Reads and checks the environment variables that launchers and schedulers set."""

import math
import os
import socket

from dist_lm.errors import UserError

_MOST_DIGITS = 9  # of a number


def refuse_bad_environment() -> None:
    """Refuse what a launcher has set wrongly, before it is used anywhere."""
    for name in ("LOCAL_RANK", "MASTER_PORT", "DIST_LM_ATTEMPT"):
        environment_number(name, 0)
    end_of_job()
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if environment_number(name, 1) < 1:
            raise UserError(f"{name}=0 must be at least 1; nearest: 1, or unset it")
    world = environment_number("WORLD_SIZE", 1)
    if own_rank() >= world:
        raise UserError(f"RANK={own_rank()} must be below WORLD_SIZE={world}; nearest: {world - 1}")


def environment_number(name: str, default: int) -> int:
    """The whole number in an environment variable, or the default where there is none."""
    text = os.environ.get(name)
    if not text:
        return default
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise UserError(f"{name}={text} must be a whole number; nearest: {default}, or unset it")
    return int(text)


def own_rank() -> int:
    """This process's place among the ranks, before they have met."""
    return environment_number("RANK", 0)


def rank_here(rank: int) -> str:
    """The name of a rank of this host, for messages."""
    return f"rank {rank} on {socket.gethostname()}"


def end_of_job() -> float:
    """The end of the job, in seconds since 1970; infinite without a scheduler."""
    text = os.environ.get("DIST_LM_STOP_AT") or "inf"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise UserError(f"DIST_LM_STOP_AT={text} must be a time in seconds since 1970; or unset it")
    return seconds
