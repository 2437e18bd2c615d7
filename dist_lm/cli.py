"""cli."""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import yaml
from pydantic import ValidationError

from dist_lm.config import FIELDS, NESTED, SECTIONS, Config
from dist_lm.errors import UserError, did_you_mean, nearest


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise UserError(
                    f"{key} is given twice (line {key_node.start_mark.line + 1}); rule: once"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file as {'section.field': value}."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        beside = Path(path).parent.glob("*.yaml")
        raise UserError(
            f"--config {path}: cannot be read ({reason}){did_you_mean(str(path), beside)}"
        ) from error
    try:
        content = yaml.load(text, _Loader) or {}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: must be a mapping of the sections {', '.join(SECTIONS)}, not {content!r}"
        )
    settings = {}
    for section, fields in content.items():
        if section not in SECTIONS:
            raise UserError(
                f"{path}: unknown section {section!r}{did_you_mean(str(section), SECTIONS)}"
            )
        if not isinstance(fields, dict):
            raise UserError(f"{path}: {section} must be a mapping of its fields, not {fields!r}")
        settings.update({f"{section}.{field}": value for field, value in fields.items()})
    return settings


def split_arguments(
    argv: Sequence[str], flags: Mapping[str, str]
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Split a command line into an entry's own `flags` (name -> help; its values are collected) and settings."""
    given: dict[str, list[str]] = {}
    settings: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(
                f"{word!r} is not a flag; rule: --section.field VALUE{did_you_mean('--' + word, flags)}"
            )
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        values = [value] if equals else []
        while words and not words[0].startswith("--") and not equals:
            values.append(words.pop(0))
        if name in flags:
            given.setdefault(name, []).extend(values or ["true"])
        elif name in FIELDS:
            if not values and name != "run.trackers":  # a list, which may be empty
                raise UserError(f"--{name} needs a value: --{name} {FIELDS[name].default!r}")
            if name in settings:
                raise UserError(f"--{name} is given twice; rule: once")
            settings[name] = parse_value(name, values)
        else:
            raise UserError(f"unknown flag --{name}{did_you_mean(name, [*FIELDS, *flags], '--')}")
    return given, settings


def resolve(*levels: tuple[str, Mapping[str, Any]]) -> Config:
    """Merge (origin, settings) levels, later ones winning over earlier ones and over the defaults, and validate."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for where, settings in levels:
        length = [name for name in ("run.steps", "run.epochs") if settings.get(name) is not None]
        if len(length) == 2:
            raise UserError(
                f"{where}: run.steps={settings['run.steps']} and run.epochs={settings['run.epochs']} exclude each"
                " other; rule: give one"
            )
        if length:  # the one given at the later level stands
            merged.update({"run.steps": None, "run.epochs": None})
        for name, value in settings.items():
            if name not in FIELDS:
                raise UserError(f"{where}: unknown field {name}{did_you_mean(name, FIELDS)}")
            merged[name] = tuple(value) if isinstance(value, list) else value
            origin[name] = where
            if value is None and FIELDS[name].default is None:  # null: unset again
                del merged[name]
    nested: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in merged.items():
        section, field = name.split(".")
        nested[section][field] = value
    try:
        return Config.model_validate(nested)
    except ValidationError as error:
        raise UserError(_explain(error, origin)) from None


def load(
    argv: Sequence[str], flags: Mapping[str, str], usage: str
) -> tuple[Config, dict[str, list[str]]]:
    """Read an entry's command line, which may name a YAML file by --config; answers --help and --print_config."""
    flags = {
        "config": "YAML file with the settings that differ from the defaults.",
        "print_config": "Print the resolved settings and stop.",
        **flags,
    }
    wants_help = any(word in ("-h", "--help") for word in argv)
    given, settings = split_arguments(
        [word for word in argv if word not in ("-h", "--help")], flags
    )
    levels = [(path, read_yaml(path)) for path in given.get("config", [])]
    config = resolve(*levels, ("command line", settings))
    if wants_help or "print_config" in given:
        print(help_text(config, flags, usage) if wants_help else config.to_yaml(), end="")
        sys.exit(0)
    return config, given


def help_text(config: Config, flags: Mapping[str, str], usage: str) -> str:
    """Every field with type, value under the given settings and meaning, laid out by tyro."""
    import tyro  # only here: a run needs no help text

    lines = [f"--{name}: {text}" for name, text in flags.items()]
    for name, section in NESTED.items():  # which tyro leaves out
        lines.append(f"--{name}: {FIELDS[name].description} In YAML, each with:")
        lines += [
            f"    {field}: {info.description}" for field, info in section.model_fields.items()
        ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(
            Config,
            default=config,
            args=["--help"],
            prog=usage,
            description="\n".join(lines),
            config=(tyro.conf.FlagConversionOff,),
        )
    return out.getvalue()


class FlagParser(argparse.ArgumentParser):
    """argparse for entries whose flags are no settings: hyphens count as underscores, and an error is one line."""

    def __init__(self, prog: str, description: str | None):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=form)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        arguments, rest = self.parse_known_intermixed_args(
            [_with_underscores(word) for word in argv]
        )
        if rest:
            raise UserError(
                f"unknown argument {rest[0]}{did_you_mean(rest[0], self._option_string_actions)}"
            )
        return arguments

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _with_underscores(word: str) -> str:
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _explain(error: ValidationError, origin: Mapping[str, str]) -> str:
    """The first validation error as one line: where it was set, field, value, rule, nearest good value."""
    first = error.errors(include_url=False)[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if (
        kind == "value_error"
    ):  # one of our own rules, already worded; it may name fields set anywhere
        text = str(context["error"])
        where = next((origin[name] for name in re.findall(r"\w+\.\w+", text) if name in origin), "")
        return f"{where}: {text}" if where else text
    path = [str(part) for part in first["loc"] if part != "[key]"]
    name = ".".join(path[:2])
    field = ".".join(path) if name in NESTED else name
    where = origin.get(name, "defaults")
    if kind == "extra_forbidden":
        return f"{where}: unknown field {field}{did_you_mean(path[-1], NESTED[name].model_fields)}"
    rule = first["msg"].partition(" should ")[2] or f"be right: {first['msg']}"
    good: Any = FIELDS[name].default if field == name else None
    if kind == "literal_error":
        options = re.findall(r"'(.*?)'", context["expected"])
        rule, good = "be one of " + ", ".join(options), nearest(str(value), options)
    elif kind in ("greater_than_equal", "less_than_equal"):
        good = context.get("ge", context.get("le"))
    elif kind.startswith("int_") and isinstance(value, float):
        good = round(value)
    elif kind.startswith("bool_"):
        good = "true" if str(value).lower() in ("1", "yes", "on", "y", "t") else "false"
    hint = "" if good in ("", None) else f"; nearest: {good}"
    return f"{where}: {field}={value!r} must {rule}{hint}"


def parse_value(name: str, words: list[str]) -> Any:
    """The value of a command line field: text as it stands where a field is text, otherwise as YAML reads it."""
    annotation = FIELDS[name].annotation
    if get_origin(annotation) is tuple:
        return (
            words
            if get_args(annotation)[0] is str
            else [yaml.load(word, _Loader) for word in words]
        )
    if len(words) > 1:
        raise UserError(
            f"--{name} takes one value, not {' '.join(words)!r}; rule: quote a value with spaces"
        )
    if annotation is str or (str in get_args(annotation) and words[0] not in ("null", "None")):
        return words[0]
    try:
        return None if words[0] == "None" else yaml.load(words[0], _Loader)
    except yaml.YAMLError:
        return words[0]
