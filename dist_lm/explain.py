"""A validation error as one line: its origin, the field, its value, the rule, the nearest value."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dist_lm.config import FIELDS, NESTED, plain_type
from dist_lm.nearest import closest, did_you_mean

UNTOLD = 10**9  # an upper limit from here on is told only to those who exceed it


def explain_setting(error: ValidationError, origin: Mapping[str, str]) -> str:
    """The first error in the settings of a run. `origin` tells where each of them was set."""
    first = error.errors(include_url=False)[0]
    kind = first["type"]
    value = first["input"]
    if kind == "value_error":
        return _with_origin(str(first["ctx"]["error"]), origin)
    path = [str(part) for part in first["loc"] if part != "[key]"]
    name = ".".join(path[:2])
    where = origin.get(name, "defaults")
    field = ".".join(path) if name in NESTED else name
    if kind == "extra_forbidden":
        hint = did_you_mean(path[-1], NESTED[name].model_fields)
        return f"{where}: unknown field {field}{hint}"
    rule = first["msg"].partition(" should ")[2] or f"be right: {first['msg']}"
    good: Any = FIELDS[name].default if field == name else None
    context = first.get("ctx", {})
    if kind == "literal_error":
        options = re.findall(r"'(.*?)'", context["expected"])
        rule = "be one of " + ", ".join(options)
        good = closest(str(value), options)
    elif kind in ("missing", "too_long") and isinstance(value, tuple):
        number = len(get_args(FIELDS[name].annotation))
        rule = f"have {number} values"
        rest = FIELDS[name].default[len(value) :]
        good = " ".join(str(part) for part in (*value, *rest)[:number])
        value = " ".join(map(str, value))
        return f"{where}: {field}={value} must {rule}; nearest: {good}"
    elif kind.startswith(("int_", "float_")) and isinstance(value, str):
        good = _leading_number(value) or good
    elif kind in ("greater_than_equal", "less_than_equal"):
        good = context.get("ge", context.get("le"))
    elif kind.startswith("int_") and isinstance(value, float) and math.isfinite(value):
        good = round(value)
    elif kind.startswith("bool_"):
        good = "true" if str(value).lower() in ("1", "yes", "on", "y", "t") else "false"
    hint = "" if good in ("", None) else f"; nearest: {good}"
    return f"{where}: {field}={value!r} must {rule}{hint}"


def _leading_number(text: str) -> str:
    """The number that a text begins with, or nothing: 3e-4 of 3e-4x."""
    found = re.match(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", text.strip())
    return found[0] if found else ""


def _with_origin(text: str, origin: Mapping[str, str]) -> str:
    """A rule of our own, already worded, after the origin of the first field it names."""
    for name in re.findall(r"\w+\.\w+", text):
        if name in origin:
            return f"{origin[name]}: {text}"
    return text


def explain_flag(
    error: ValidationError, fields: Mapping[str, FieldInfo], words: Mapping[str, list[str]]
) -> str:
    """The first error in a command's own flags, whose values are `words`."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = str(first["loc"][0])
    info = fields[name]
    if first["type"] == "missing":
        what = (info.description or "").rstrip(".")
        return f"--{name} must be given once: {what[:1].lower()}{what[1:]}"
    text = words[name][-1]
    kind = plain_type(info.annotation)
    if get_origin(kind) is Literal:
        options = get_args(kind)
        hint = did_you_mean(text, options)
        return f"--{name}={text} must be one of {', '.join(options)}{hint}"
    if kind in (int, float):
        return Numbers.of(info).error(name, text)
    if kind is bool:
        return f"--{name}={text} must be true or false; nearest: true"
    return f"--{name}={text}: {first['msg']}"


@dataclass(frozen=True)
class Numbers:
    """The numbers that a flag takes."""

    low: float
    high: float
    is_whole: bool = True
    low_is_excluded: bool = False
    default: float | None = None
    # A sensible value, where one at the limit would be accepted but of no use.
    example: float | None = None

    @classmethod
    def of(cls, info: FieldInfo) -> "Numbers":
        """The numbers that a field takes, from its ge or gt, and le."""
        limits = {}
        for limit in info.metadata:
            for name in ("ge", "gt", "le"):
                if hasattr(limit, name):
                    limits[name] = getattr(limit, name)
        return cls(
            low=limits.get("ge", limits.get("gt", -math.inf)),
            high=limits.get("le", math.inf),
            is_whole=plain_type(info.annotation) is int,
            low_is_excluded="gt" in limits,
            default=None if info.is_required() else info.default,
            example=info.examples[0] if info.examples else None,
        )

    def error(self, name: str, text: str) -> str:
        """The error for a text that is none of them. It names the nearest one."""
        value = self.read(text)
        kind = "a whole number" if self.is_whole else "a number"
        if self.low_is_excluded:
            rule = f"above {self._spell(self.low)} and at most {self._spell(self.high)}"
        elif self.high < UNTOLD or value > self.high:
            rule = f"from {self._spell(self.low)} to {self._spell(self.high)}"
        else:
            rule = f"of {self._spell(self.low)} or more"
        good = self._spell(self.nearest(value))
        return f"--{name}={text} must be {kind} {rule}; nearest: {good}"

    def read(self, text: str) -> float:
        """The number that a text stands for; NaN if it stands for none."""
        try:
            return int(text) if self.is_whole else float(text)
        except ValueError:
            return math.nan

    def nearest(self, value: float) -> float:
        if self.example is not None:
            return self.example
        if math.isnan(value):
            return self.low if self.default is None else self.default
        return min(max(value, self.low), self.high)

    def _spell(self, number: float) -> str:
        return str(number) if self.is_whole else f"{number:g}"
