"""The page that --help prints: every flag and setting with its type, its value and its meaning.

Plain text, wrapped to the terminal. Each section is shown once. So are the sections that a setting
holds in YAML, such as the sources of a mixture.
"""

import inspect
import json
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from dist_lm.config import (
    FIELDS,
    NESTED,
    SECTIONS,
    Config,
    Section,
    fields_by_name,
    is_list,
    list_type,
    plain_type,
)

WIDEST = 100  # columns; longer lines are hard to read, however wide the terminal is
TYPE_NAMES = {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false"}


class HelpPage:
    """Lines of a page, wrapped to the terminal as they are added."""

    def __init__(self, usage: str) -> None:
        self.width = min(shutil.get_terminal_size().columns, WIDEST)
        self.lines: list[str] = []
        self.add(f"usage: {usage}", hanging=7)

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"

    def add(self, text: str, indent: int = 0, hanging: int = 0) -> None:
        """One paragraph; `hanging` columns more from its second line on."""
        first = " " * indent
        self.lines += textwrap.wrap(
            text,
            self.width,
            initial_indent=first,
            subsequent_indent=first + " " * hanging,
            break_long_words=False,
            break_on_hyphens=False,
        )

    def add_docstring(self, section: type[Section], title: str = "") -> None:
        """The title and the meaning of a section, paragraph by paragraph."""
        text = title + inspect.cleandoc(section.__doc__ or "")
        for paragraph in text.split("\n\n"):
            self.lines.append("")
            self.add(" ".join(paragraph.split()))

    def add_field(self, label: str, value: str, meaning: str | None) -> None:
        self.add(f"{label} ({value})" if value else label, indent=2, hanging=4)
        self.add(meaning or "", indent=6)


def add_flags(
    page: HelpPage, flags: type[Section], given: Mapping[str, Any], positional: str = ""
) -> None:
    """A command's own flags. `given` has the values of those that are set."""
    page.add_docstring(flags)
    page.lines.append("")
    page.add("In parentheses: the value under the given files and flags.")
    page.lines.append("")
    for name, info in fields_by_name(flags).items():
        type_name = name_of_type(info)
        label = f"--{name} {type_name}"
        if info.annotation is bool:  # such a flag needs no value
            label = f"--{name} [{type_name}]"
        if name == positional:
            label = name.upper()
        value = given.get(name, info.default)
        is_set = name in given or not info.is_required()
        page.add_field(label, spell(value) if is_set else "", info.description)


def add_settings(page: HelpPage, settings: Mapping[str, str], config: Config) -> None:
    """The settings of a run that a command takes: their names on its command line, and fields."""
    values = config.flat()
    for section_name, section in SECTIONS.items():
        names = [name for name in settings if settings[name].startswith(f"{section_name}.")]
        if names:
            page.add_docstring(section, f"{section_name}: ")
            page.lines.append("")
        for name in names:
            field = settings[name]
            info = FIELDS[field]
            page.add_field(f"--{name} {name_of_type(info)}", spell(values[field]), info.description)
    for section in dict.fromkeys(NESTED.values()):
        fields = [field for field in settings.values() if NESTED.get(field) is section]
        if fields:
            page.add_docstring(section, f"Each of {' and '.join(fields)}, in YAML: ")
            page.lines.append("")
            add_nested(page, section)


def add_nested(page: HelpPage, section: type[Section]) -> None:
    for name, info in section.model_fields.items():
        value = "" if info.is_required() else spell(info.default)
        page.add_field(f"{name} {name_of_type(info)}", value, info.description)


def name_of_type(info: FieldInfo) -> str:
    """The values that a field takes: its choices, or e.g. INT."""
    kind = plain_type(info.annotation)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if is_list(info):
        names = []
        for part in get_args(list_type(info)):
            name = TYPE_NAMES.get(plain_type(part), "YAML")
            names.append("..." if part is Ellipsis else name)
        return " ".join(names)
    return TYPE_NAMES.get(kind, "YAML")


def spell(value: Any) -> str:
    """A value as it may be given on the command line; `unset` and `none` stand for nothing."""
    match value:
        case None:
            return "unset"
        case bool():
            return str(value).lower()
        case "":
            return "''"
        case str() if value.isprintable() and " " not in value:
            return value
        case str():
            return repr(value)
        case tuple() | list() | dict() if not value:
            return "none"
        case tuple() | list() if not any(isinstance(part, dict) for part in value):
            return " ".join(spell(part) for part in value)
        case tuple() | list() | dict():
            return json.dumps(value)
    return str(value)
