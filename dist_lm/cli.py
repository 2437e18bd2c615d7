"""Command lines: defaults < YAML < flags, read in the same way for every command.

A command declares its flags as a section, like those of config.py, and names the settings of a run
that it takes besides. Hyphens in names count as underscores, `--name=value` is `--name value`, and
a flag that is true or false needs no value. Every mistake is one line: where it was made, the
field, its value, the rule and the nearest good value. Nothing here imports torch, so that it comes
at once.
"""

import re
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_args, get_origin

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from dist_lm.config import FIELDS, SECTIONS, Config, Section, fields_by_name, is_list, plain_type
from dist_lm.errors import UserError
from dist_lm.explain import explain_flag, explain_setting
from dist_lm.helptext import HelpPage, add_flags, add_settings
from dist_lm.nearest import closest, did_you_mean, nearest
from dist_lm.pretrained import settings_to_take
from dist_lm.safe_yaml import LARGEST, parse
from dist_lm.shipped import recipes

ALL_SETTINGS: Mapping[str, str] = {name: name for name in FIELDS}
# Marks a list of texts: each takes one value at a time, so that a forgotten quote in
# `--prompt two words` does not make two prompts.
ONE_AT_A_TIME = "one at a time"

_HELP = {"-h", "--help"}
# Flags by which other commands take a run.
_NAMES_OF_A_RUN = {"ckpt", "checkpoint", "model", "run", "run.dir"}
_NAME = re.compile(r"--[A-Za-z][\w.-]*(=.*)?", re.DOTALL)  # other words are values, e.g. -1


class ConfigFlags(Section):
    """Flags of every command that takes the settings of a run."""

    config: tuple[str, ...] = Field(
        (), description="YAML file with settings that differ from the defaults, or a recipe's name."
    )
    print_config: bool = Field(False, description="Print the resolved settings and stop.")


Flags = TypeVar("Flags", bound=Section)
RunFlags = TypeVar("RunFlags", bound=ConfigFlags)


@dataclass(frozen=True)
class Command(Generic[Flags]):
    """The flags and settings that a command takes."""

    usage: str  # e.g. python -m dist_lm.report RUN
    flags: type[Flags]
    # Settings of a run that it takes: from the name on the command line to the field.
    settings: Mapping[str, str] = field(default_factory=dict)
    positional: str = ""  # the flag that words without a name belong to
    refusal: str = ""  # why the other settings of a run cannot be given
    # Flags of the scripts that start this command: from the name to the script.
    of_scripts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def fields(self) -> dict[str, FieldInfo]:
        """The flags by name."""
        return fields_by_name(self.flags)

    def hint(self, name: str) -> str:
        """Text that names the flag that is meant, or an empty string."""
        if name in _NAMES_OF_A_RUN and self.positional:
            return f"; rule: {self.positional.upper()} stands without a flag"
        if name in _NAMES_OF_A_RUN and "ckpt" in self.fields:
            return "; did you mean --ckpt?"
        flags = [flag for flag in self.fields if flag != self.positional]
        guess = closest(name, [*self.settings, *flags, *self.of_scripts])
        if not guess:
            return ""
        if guess in self.of_scripts:
            guess += f" of {self.of_scripts[guess]}"
        return f"; did you mean --{guess}?"


# --- reading


def read_flags(argv: Sequence[str], command: Command[Flags]) -> Flags:
    """The flags of a command that takes no settings of a run. Answers --help."""
    flags, _ = read_flags_and_settings(argv, command)
    return flags


def read_flags_and_settings(
    argv: Sequence[str], command: Command[Flags]
) -> tuple[Flags, dict[str, Any]]:
    """A command's flags, and the settings among them as {'section.field': value}.

    Answers --help.
    """
    if _HELP & set(argv):
        _print_help(command, {}, Config())
    return _read(argv, command)


def load(argv: Sequence[str], command: Command[RunFlags]) -> tuple[Config, RunFlags]:
    """The settings of a run, from the defaults, --config and the command line, and the flags.

    What run.init_from names brings its shape, context and tokenizer along.
    Answers --help, with these settings as values, and --print_config.
    """
    flags, settings = _read([word for word in argv if word not in _HELP], command)
    levels = [(path, read_yaml(path)) for path in flags.config]
    levels.append(("command line", settings))
    given, _ = _merge(levels)
    taken = settings_to_take(given)
    config = resolve(*levels, (f"run.init_from={given.get('run.init_from')}", taken))
    if _HELP & set(argv):
        _print_help(command, flags.model_dump(by_alias=True), config)
    if flags.print_config:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config, flags


def resolve(*levels: tuple[str, Mapping[str, Any]]) -> Config:
    """Merge levels of (origin, settings) and validate. A later level wins over the earlier ones."""
    merged, origin = _merge(levels)
    nested: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in merged.items():
        section, _, field_name = name.partition(".")
        nested[section][field_name] = value
    try:
        return Config.model_validate(nested)
    except ValidationError as error:
        raise UserError(explain_setting(error, origin)) from None


def _merge(
    levels: Iterable[tuple[str, Mapping[str, Any]]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of all levels, not validated yet, and where each was set."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for where, settings in levels:
        _let_one_length_stand(where, settings, merged)
        for name, value in settings.items():
            if name not in FIELDS:
                raise UserError(f"{where}: unknown field {name}{did_you_mean(name, FIELDS)}")
            merged[name] = tuple(value) if isinstance(value, list) else value
            origin[name] = where
            if value is None and FIELDS[name].default is None:  # null: unset again
                del merged[name]
    return merged, origin


def _let_one_length_stand(where: str, settings: Mapping[str, Any], merged: dict[str, Any]) -> None:
    """run.steps or run.epochs of a later level replaces either of an earlier one."""
    steps = settings.get("run.steps")
    epochs = settings.get("run.epochs")
    if steps is not None and epochs is not None:
        raise UserError(
            f"{where}: run.steps={steps} and run.epochs={epochs} exclude each other; rule: give one"
        )
    if steps is not None or epochs is not None:
        merged["run.steps"] = None
        merged["run.epochs"] = None


def _print_help(command: Command[Any], given: Mapping[str, Any], config: Config) -> NoReturn:
    page = HelpPage(command.usage)
    add_flags(page, command.flags, given, command.positional)
    add_settings(page, command.settings, config)
    print(page, end="")
    sys.exit(0)


# --- YAML


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file as {'section.field': value}."""
    content = _parse_file(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: must be a mapping of the sections {', '.join(SECTIONS)}, not {content!r}"
        )
    settings = {}
    for section, fields in content.items():
        if section not in SECTIONS:
            hint = did_you_mean(str(section), [*SECTIONS, *FIELDS])
            raise UserError(f"{path}: unknown section {section!r}{hint}")
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {section} must be a mapping of its fields, not {fields!r}")
        for name, value in fields.items():
            settings[f"{section}.{name}"] = value
    return settings


def find_yaml(name: str | Path) -> Path:
    """A file by its path, or a recipe by its name."""
    path = Path(name)
    if path.exists():
        return path
    return recipes().get(str(name), path)


def _parse_file(path: str | Path) -> Any:
    try:
        with open(find_yaml(path), encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        guess = nearest(str(path), [*recipes(), *Path(path).parent.glob("*.yaml")])
        hint = f"; did you mean {guess}?" if guess else ""
        raise UserError(f"--config {path}: cannot be read ({reason}){hint}") from error
    try:
        return parse(text) or {}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_value(name: str, words: list[str]) -> Any:
    """The value of a setting: text as it stands where the field is text, otherwise as YAML."""
    annotation = FIELDS[name].annotation
    if len(words) > 1 and get_origin(annotation) is not tuple:
        return words  # of a field that takes one or several
    if get_origin(annotation) is tuple:
        is_text = get_args(annotation)[0] is str
        return words if is_text else [_parse_word(word) for word in words]
    (word,) = words
    if annotation is str:
        return word
    if word == "None":
        return None
    may_be_text = str in get_args(annotation) and get_origin(annotation) is not dict
    if may_be_text and word != "null":
        return word
    return _parse_word(word)


def _parse_word(word: str) -> Any:
    """The value of a word; what is no YAML stays text, which validation judges."""
    try:
        return parse(word)
    except UserError:
        return word


# --- the command line


def _read(argv: Sequence[str], command: Command[Flags]) -> tuple[Flags, dict[str, Any]]:
    flag_words, setting_words = _split(argv, command)
    settings = {}
    for name, words in setting_words.items():
        field_name = command.settings[name]
        settings[field_name] = parse_value(field_name, words)
    values = {}
    for name, words in flag_words.items():
        values[name] = _flag_value(command.fields[name], words)
    if command.positional and command.positional not in values:
        raise _misuse(argv, command)
    try:
        return command.flags.model_validate(values), settings
    except ValidationError as error:
        raise UserError(explain_flag(error, command.fields, flag_words)) from None


def _split(
    argv: Sequence[str], command: Command[Any]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The values of each flag and of each setting, as text.

    Of a flag given twice the last stands, so that a script's defaults come first; a list collects.
    A setting is given once.
    """
    flags: dict[str, list[str]] = {}
    settings: dict[str, list[str]] = {}
    words = deque(argv)
    while words:
        word = words.popleft()
        if not _NAME.fullmatch(word):
            _add_positional(flags, word, argv, command)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        values = [value] if equals else _take_values(words, name, command)
        if name in command.settings:
            if name in settings:
                raise UserError(f"--{name} is given twice; rule: once")
            settings[name] = values
            _check_number_of_values(name, FIELDS[command.settings[name]], values, may_be_empty=True)
        elif name in command.fields and name != command.positional:
            info = command.fields[name]
            _check_number_of_values(name, info, values)
            earlier = flags.get(name, []) if is_list(info) else []
            flags[name] = earlier + values
        elif name in FIELDS and command.refusal:
            raise UserError(f"--{name}: {command.refusal}")
        elif name in FIELDS and command.positional:
            raise _misuse(argv, command)
        else:
            raise UserError(f"unknown flag --{name}{command.hint(name)}")
    return flags, settings


def _take_values(words: deque[str], name: str, command: Command[Any]) -> list[str]:
    """Take the words that belong to a name, from the front of those that follow it."""
    info = command.fields.get(name)
    if info is not None and info.annotation is bool:
        has_value = bool(words) and words[0] in ("true", "false")
        return [words.popleft()] if has_value else ["true"]
    values: list[str] = []
    while words and not _NAME.fullmatch(words[0]):
        values.append(words.popleft())
        if command.positional:
            break  # the words after the first one are not this flag's
    return values


def _check_number_of_values(
    name: str, info: FieldInfo, values: list[str], may_be_empty: bool = False
) -> None:
    """One value; several for a list; none for a list of any length that may be empty."""
    any_length = is_list(info) and Ellipsis in get_args(info.annotation)
    if not values and not (any_length and may_be_empty):
        has_default = not info.is_required() and info.default not in (None, ())
        example = f": --{name} {info.default!r}" if has_default else ""
        raise UserError(f"--{name} needs a value{example}")
    if len(values) > 1 and (not is_list(info) or ONE_AT_A_TIME in info.metadata):
        raise UserError(
            f"--{name} takes one value, not {' '.join(values)!r}; rule: quote a value with spaces"
        )


def _add_positional(
    flags: dict[str, list[str]], word: str, argv: Sequence[str], command: Command[Any]
) -> None:
    name = command.positional
    if not name:
        form = "--section.field VALUE" if command.settings else "--name VALUE"
        raise UserError(f"{word!r} is not a flag; rule: {form}{command.hint(word)}")
    is_full = name in flags and not is_list(command.fields[name])
    if is_full or word.startswith("-"):
        raise _misuse(argv, command)
    flags.setdefault(name, []).append(word)


def _misuse(argv: Sequence[str], command: Command[Any]) -> UserError:
    """The error for a command line that is wrong as a whole."""
    return UserError(f"{' '.join(argv) or 'no argument'}: rule: {command.usage}")


def _flag_value(info: FieldInfo, words: list[str]) -> Any:
    """The value of a flag; a word that does not fit stays text, which validation refuses."""
    if is_list(info):
        return tuple(words)
    (word,) = words
    kind = plain_type(info.annotation)
    if kind is bool:
        return {"true": True, "false": False}.get(word, word)
    if kind not in (int, float):
        return word
    try:
        return kind(word)
    except ValueError:
        return word
