"""errors."""

import difflib
import gc
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from dist_lm.launcher import RETRYABLE

Result = TypeVar("Result")


class UserError(ValueError):
    """Something a user can fix. Commands print it as one line and exit with its `code`."""

    code = 2


class DataError(UserError):
    """The text, the shards or the tokenizer cannot be used."""

    code = 65


class CheckpointError(UserError):
    """A checkpoint, or a file of a run, is missing or cannot be used."""

    code = 66


class RetryableError(UserError):
    """The machines failed; the same command may work later."""

    code = 70


class PreemptedError(UserError):
    """The run was told to stop; the same command goes on."""

    code = 75


class DivergedError(UserError):
    """The loss or a gradient is not finite."""

    code = 76


class SecurityError(UserError):
    """The environment would let a file run code."""

    code = 77


def error_with_code(message: str, code: int) -> UserError:
    """The error of that kind: for errors that another rank raised, which travel as text and code."""
    for kind in UserError.__subclasses__():
        if kind.code == code:
            return kind(message)
    return UserError(message)


def run_entry(main: Callable[[list[str]], Result]) -> Result:
    """Run an entry's main(argv) at the process edge: a UserError is one line, said by rank 0, and its exit code.

    An interrupt ends with 130, a closed pipe without a word.
    """
    gc.set_threshold(
        100_000
    )  # by default all of torch's modules are looked through again and again as they come
    try:
        result = main(sys.argv[1:])
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python complains when it flushes at exit
        sys.exit(0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


def nearest(value: str, options: Any) -> str:
    """The option most like `value`, or an empty string."""
    found = difflib.get_close_matches(value, [str(option) for option in options], n=1, cutoff=0.5)
    return found[0] if found else ""


def did_you_mean(value: str, options: Any, prefix: str = "") -> str:
    """'; did you mean X?', looking also for the last part of a dotted name in other sections; or nothing."""
    options = [str(option) for option in options]
    same_field = [
        option for option in options if option.rpartition(".")[2] == value.rpartition(".")[2]
    ]
    guess = same_field[0] if same_field else nearest(value, options)
    return f"; did you mean {prefix}{guess}?" if guess else ""


CODES = {
    "done": 0,
    "config": 2,
    "data": 65,
    "checkpoint": 66,
    "retryable": RETRYABLE,
    "preempted": 75,
    "diverged": 76,
    "security": 77,
}


def kind(code: int) -> str:
    return next((name for name, known in CODES.items() if known == code), "retryable")


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
