"""The one door for JSON that others may have written: bounded, and checked before it is used.

A checkpoint, a prepared folder or a tokenizer may come from a stranger, or may have been damaged.
So each JSON file is read here, from a regular file of bounded size. Its depth and its numbers are
bounded too. What passes can be walked, printed and compared without surprises. Which fields it has
is for a pydantic model to say.
"""

import errno
import json
import os
import re
import reprlib
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dist_lm.console import printable
from dist_lm.errors import UserError

LARGEST = 128 * 2**20  # bytes of a file
LARGEST_NUMBER = 2**64 - 1  # larger whole numbers fit into no array
DEEPEST = 64  # levels of nesting; our own files have less than 10, a tokenizer less than 20
_LONGEST_NAME = 200  # characters of a file name. A cache puts some before it; 255 are allowed.
_LONGEST_PART = 60  # characters that a message shows of a field's name

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")


# --- the fields of models


def _check_file_name(name: str) -> str:
    if not FILE_NAME.fullmatch(name):
        raise ValueError(f"must match {FILE_NAME.pattern}")
    return name


def _check_sha256(text: str) -> str:
    if not SHA256.fullmatch(text):
        raise ValueError(f"must match {SHA256.pattern}")
    return text


Count = Annotated[int, Field(ge=0, le=2**48)]
FileName = Annotated[str, Field(max_length=_LONGEST_NAME), AfterValidator(_check_file_name)]
Sha256 = Annotated[str, AfterValidator(_check_sha256)]
Text = Annotated[str, Field(max_length=2**16)]  # short enough to be repeated in a message


class CheckedModel(BaseModel):
    """A part of a JSON file from outside. It may hold more fields than these, which are read."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


# --- reading and checking
#
# `refuse` makes the error from a reason, so that each caller says which file it is and what to do.

Refuse = Callable[[str], UserError]


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading.

    Refuses pipes and devices, where opening or reading may wait forever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_bytes(path: Path, refuse: Refuse, largest: int = LARGEST) -> bytes:
    """The content of a regular file of at most `largest` bytes."""
    try:
        with open_regular(path) as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror or error})") from error
    if len(data) > largest:
        raise refuse(f"has more than {largest:,} bytes")
    return data


def parse_json(data: bytes | str, refuse: Refuse, largest_number: int = LARGEST_NUMBER) -> Any:
    """The content of JSON text, within bounds.

    Refused are: a name that stands twice in an object, for which readers take different values;
    nesting deeper than DEEPEST; whole numbers above `largest_number`; and half characters.
    NaN passes, because a loss may be one; a `CheckedModel` refuses it.
    """
    try:
        text = data if isinstance(data, str) else data.decode()
        content = json.loads(text, object_pairs_hook=_object)
        _check_values(content, largest_number)
    except RecursionError as error:
        raise refuse(f"not usable JSON: deeper than {DEEPEST} levels") from error
    except UnicodeError as error:
        raise refuse("not valid JSON: not UTF-8") from error
    except json.JSONDecodeError as error:
        raise refuse(f"not valid JSON: {error}") from error
    except ValueError as error:
        raise refuse(f"not usable JSON: {printable(str(error))}") from error
    return content


def read_json(
    path: Path, refuse: Refuse, largest: int = LARGEST, largest_number: int = LARGEST_NUMBER
) -> dict[str, Any]:
    """The JSON object in a regular file of at most `largest` bytes."""
    content = parse_json(read_bytes(path, refuse, largest), refuse, largest_number)
    if not isinstance(content, dict):
        raise refuse(f"must be a JSON object, not a {type(content).__name__}")
    return content


def check(content: Any, model: type[Model], refuse: Refuse) -> Model:
    """The content that `parse_json` or `read_json` gave, as a model of its fields."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise refuse(first_fault(error)) from error


def first_fault(error: ValidationError) -> str:
    """The first validation error as one short line: field, value, rule."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part)[:_LONGEST_PART] for part in first["loc"])
    rule = first["msg"].removeprefix("Value error, ")
    if not field:
        return printable(rule)
    if first["type"] == "missing":
        return printable(f"{field}: {rule}")
    return printable(f"{field}={reprlib.repr(first['input'])}: {rule}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses one that has a name twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"{reprlib.repr(twice)} stands twice in an object")
    return content


def _check_values(content: Any, largest_number: int) -> None:
    """Refuse content that is too deep, or holds a value that others could not use.

    Goes down level by level, so that no depth can exhaust the stack.
    """
    level = [content]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            else:
                _check_value(value, largest_number)
        if not below:
            return
        level = below
    raise ValueError(f"deeper than {DEEPEST} levels")


def _check_value(value: Any, largest_number: int) -> None:
    if isinstance(value, str):
        # Only an escape like \ud800 makes a half character; it can be neither printed nor encoded.
        if not value.isascii():
            value.encode()
    elif isinstance(value, int) and not -(2**63) <= value <= largest_number:
        raise ValueError(f"{reprlib.repr(value)} is not a number of 64 bits")
