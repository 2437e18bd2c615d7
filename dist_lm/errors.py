"""Errors that a user can fix, by kind and exit code, and the end of a command.

Each kind of error is a class that knows its name and its exit code. An error is one line: the
field, its value, the rule, and the nearest good value. It is printed at the process edge only, by
run_entry().
"""

import gc
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from dist_lm.console import make_streams_last, printable, warn
from dist_lm.launcher import RETRYABLE

Result = TypeVar("Result")

INTERRUPTED = 130  # the exit code of shells for a Ctrl-C
_LONGEST_ERROR = 2_000  # characters of the text of an error


class UserError(ValueError):
    """Something a user can fix. Commands print it as one line and exit with its `code`.

    Its text is short, however long a value from outside in it is: the middle is left out.
    """

    kind = "config"  # how outcome.json names it
    code = 2

    def __init__(self, text: str):
        super().__init__(_shortened(text))


class DataError(UserError):
    """The text, the shards or the tokenizer cannot be used."""

    kind = "data"
    code = 65


class CheckpointError(UserError):
    """A checkpoint, or a file of a run, is missing or cannot be used."""

    kind = "checkpoint"
    code = 66


class RetryableError(UserError):
    """The machines failed; the same command may work later."""

    kind = "retryable"
    code = RETRYABLE


class PreemptedError(UserError):
    """The run was told to stop; the same command goes on."""

    kind = "preempted"
    code = 75


class DivergedError(UserError):
    """The loss or a gradient is not finite."""

    kind = "diverged"
    code = 76


class SecurityError(UserError):
    """The environment would let a file run code."""

    kind = "security"
    code = 77


ERRORS: tuple[type[UserError], ...] = (UserError, *UserError.__subclasses__())
# How a run can end, and the exit code that says so.
CODES = {"done": 0} | {error.kind: error.code for error in ERRORS}


def kind(code: int) -> str:
    """The kind of an ending, from its exit code. Any other code means that the machines failed."""
    for name, known in CODES.items():
        if code == known:
            return name
    return RetryableError.kind


def error_with_code(message: str, code: int) -> UserError:
    """The error with that code. An error of another rank travels as text and code."""
    for error in ERRORS:
        if error.code == code:
            return error(message)
    return UserError(message)


def run_entry(main: Callable[[list[str]], Result], prints_result: bool = True) -> Result:
    """Run a command's main(argv) at the process edge.

    A UserError becomes one line, printed by rank 0, and its exit code. An interrupt ends with
    130. A command that prints its result ends when standard output is gone: with 0 if its reader
    has seen enough, else with an error. Any other command goes on without it.
    """
    # Importing torch makes many objects that stay. With the default threshold the
    # collector would look through them again and again.
    gc.set_threshold(100_000)
    make_streams_last(_refuse_lost_output if prints_result else _warn_of_lost_output)
    try:
        return _call_and_flush(main)
    except BrokenPipeError:
        sys.exit(0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(INTERRUPTED)
    except UserError as error:
        if _speaks():
            print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(error.code)


def _speaks() -> bool:
    """Whether this process prints errors: rank 0, or one that has no place among the ranks."""
    rank = os.environ.get("RANK", "0")
    world = os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and world.isdecimal() and 0 < float(rank) < float(world))


def _call_and_flush(main: Callable[[list[str]], Result]) -> Result:
    """Call main(argv), write all that it printed, and return its result."""
    try:
        result = main(sys.argv[1:])
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return result


def _refuse_lost_output(error: OSError) -> None:
    """Standard output is gone, and with it the result of the command."""
    if isinstance(error, BrokenPipeError):
        raise error
    raise RetryableError(f"standard output: {error.strerror}; rule: a place that can be written")


def _warn_of_lost_output(error: OSError) -> None:
    warn(f"standard output is gone, the command goes on: {error.strerror}")


def _shortened(text: str) -> str:
    """The beginning and the end of a long text: the field, and the rule."""
    if len(text) <= _LONGEST_ERROR:
        return text
    half = _LONGEST_ERROR // 2
    return f"{text[:half]} ... {text[-half:]}"


def one_line(error: UserError) -> str:
    """An error of ours for a terminal: one line, however hostile a value in it is."""
    return printable(" ".join(str(error).splitlines()))


def in_a_line(error: BaseException) -> str:
    """An error that is not ours, short enough for one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
