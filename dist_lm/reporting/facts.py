"""All that a page shows of one run, from its folder alone; the run may still be going on.

A run folder may come from a stranger. What is in it is text and numbers to the page, never code,
and what is missing or broken is left out.
"""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_lm.cli import read_yaml
from dist_lm.config import FIELDS
from dist_lm.console import printable
from dist_lm.curves import smooth, trailing_means
from dist_lm.errors import CheckpointError, UserError
from dist_lm.evals import read_evals
from dist_lm.goodput import History
from dist_lm.helptext import spell
from dist_lm.metrics import FILE as METRICS
from dist_lm.metrics import steps_and_evaluations
from dist_lm.outside import read_json
from dist_lm.reporting.samples import read_samples
from dist_lm.reporting.series import (
    curve,
    middles,
    number_in,
    short,
    shortened,
    steps_a_point,
)
from dist_lm.reporting.spending import Spent, spent_at_steps, spent_so_far

# The figures of a step that have a curve, where a run has them.
CURVES = (
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "mfu",
    "memory_gb",
    "data_wait",
    "scale",
)
_STDERR = "_stderr"  # ends the name of a metric's standard error
_SHAKY_END = 200  # the part of a smoothed curve, at its end, that is not shown
MOST_SOURCES = 40
MOST_EVENTS = 200
_LONGEST_VALUE = 300  # characters of a setting
_LARGEST_MANIFEST = 16 * 2**20  # bytes
_SECONDS_OF_SILENCE = 900.0  # after which a run that did not say that it ended does not run either
# Of a URL: a user with a password, and what follows a question mark, which may be a signature.
_USER = re.compile(r"(\w://)[^/@\s'\"]+@")
_QUERY = re.compile(r"(\w://[^\s'\"?]+\?)[^\s'\"]+")


def facts_of(name: str, run_dir: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of a run. `lines` are those of its metrics.jsonl, of which one is a step's."""
    steps, evaluations = steps_and_evaluations(lines)
    history = History(lines)
    places = spent_at_steps(history, steps)
    settings = settings_of(run_dir)
    total = spent_so_far(history, places)
    x_of = _Places(steps, places)
    return {
        "name": safe(name),
        "state": state_of(run_dir, history),
        "updated": Path(run_dir, METRICS).stat().st_mtime,
        "total": totals(steps, total, settings, history),
        **curves_of(steps, places),
        "validation": validation(evaluations, x_of),
        "evaluations": evaluations_of_tasks(run_dir, x_of),
        "samples": read_samples(run_dir),
        "starts": starts_of(history),
        "stops_before_training": [safe(cause) for cause in history.stops_before_training.values()],
        "seconds": {part: round(value, 1) for part, value in history.seconds().items()},
        "settings": {key: spelled(value) for key, value in settings.items()},
        "sources": sources_of(run_dir, settings, steps[-1]),
        "events": events_of(lines, steps, x_of),
    }


def safe(text: str) -> str:
    """Text for a page: nothing that disguises it, and no secrets of URLs."""
    return _QUERY.sub(r"\1…", _USER.sub(r"\1", printable(text)))


class _Places:
    """Where on each horizontal axis something is that happened after a step."""

    def __init__(self, steps: Sequence[Mapping[str, Any]], places: Sequence[Spent]):
        self._steps = steps
        self._places = places
        self._number = {step["step"]: number for number, step in enumerate(steps)}

    def __call__(self, step: int) -> list[float | None]:
        """Steps, tokens, hours and device hours; of a step without a line only the steps."""
        number = self._number.get(step)
        if number is None:
            return [step, None, None, None]
        spent = self._places[number]
        axes = [self._steps[number]["tokens"], spent.hours, spent.device_hours]
        return [step, *shortened(axes)]


# --- curves


def curves_of(steps: Sequence[Mapping[str, Any]], places: Sequence[Spent]) -> dict[str, Any]:
    """The points of all curves, and where on each horizontal axis they are."""
    size = steps_a_point(len(steps))
    axes = {
        "step": middles([step["step"] for step in steps], size),
        "tokens": middles([step["tokens"] for step in steps], size),
        "hours": shortened(middles([spent.hours for spent in places], size)),
        "device_hours": shortened(middles([spent.device_hours for spent in places], size)),
    }
    present = set().union(*steps)
    curves = {}
    for key in CURVES:
        if key in present:
            curves[key] = curve([number_in(step, key) for step in steps], size)
    line = smooth([step["loss"] for step in steps])
    # Near its end the line follows single values.
    line[len(line) - len(line) // _SHAKY_END :] = [math.nan] * (len(line) // _SHAKY_END)
    curves["loss"]["smooth"] = shortened(middles(line, size))
    shares = {}
    for source in names_of_sources(steps[-1]):
        values = [number_in(step, f"share_{source}") for step in steps]
        asked = [number_in(step, f"asked_{source}") for step in steps]
        shares[safe(source)] = {
            "share": shortened(middles(values, size)),
            "asked": shortened(middles(asked, size)),
        }
    return {"steps_a_point": size, "axes": axes, "curves": curves, "shares": shares}


def validation(evaluations: Sequence[Mapping[str, Any]], x_of: _Places) -> list[dict[str, Any]]:
    """The curve of each validation set."""
    sets: dict[str, dict[str, Any]] = {}
    for figures in evaluations:
        name = figures["val_set"]
        of_set = sets.setdefault(name, {"set": safe(name), "at": [], "loss": [], "bits": []})
        of_set["at"].append(x_of(figures["step"]))
        of_set["loss"].append(short(figures["val_loss"]))
        of_set["bits"].append(short(figures["val_bits_per_byte"]))
    return list(sets.values())


def evaluations_of_tasks(run_dir: str, x_of: _Places) -> list[dict[str, Any]]:
    """The curve of each metric of each task in evals.jsonl."""
    try:
        lines = read_evals(run_dir)
    except CheckpointError:  # a page needs none
        return []
    curves: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        task = _title_of(line)
        metrics = line["metrics"]
        for metric, value in metrics.items():
            name, comma, of_filter = metric.partition(",")  # e.g. f1,strict
            if name.endswith(_STDERR):
                continue
            error = metrics.get(f"{name}{_STDERR}{comma}{of_filter}", math.nan)
            points: dict[str, Any] = {"at": [], "value": [], "stderr": []}
            curve_of = curves.setdefault(
                (task, metric), {"task": safe(task), "metric": safe(metric), **points}
            )
            curve_of["at"].append(x_of(line["step"]))
            curve_of["value"].append(short(value))
            curve_of["stderr"].append(short(error))
    return list(curves.values())


def _title_of(line: Mapping[str, Any]) -> str:
    """A task, and what makes its figures another curve."""
    title = str(line["task"])
    if line.get("shots"):
        title += f", {line['shots']} shots"
    if line.get("limit"):
        title += f", limit {line['limit']:g}"
    return title


# --- where a run stands


def totals(
    steps: Sequence[Mapping[str, Any]],
    spent: Spent,
    settings: Mapping[str, Any],
    history: History,
) -> dict[str, Any]:
    """What a run has made and taken so far, and what it is expected to make and take."""
    last = steps[-1]
    asked = settings.get("run.steps")
    expected = None
    if isinstance(asked, int) and asked >= last["step"] > 0:
        expected = _expected(asked, last, spent, history)
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "hours": short(spent.hours),
        "device_hours": short(spent.device_hours),
        "loss": short(trailing_means([step["loss"] for step in steps])[-1]),
        "expected": expected,
    }


def _expected(
    asked: int, last: Mapping[str, Any], spent: Spent, history: History
) -> dict[str, Any]:
    """At the end of the run, if it goes on as it did, and loses no more work."""
    seconds = history.seconds()
    training = sum(seconds[part] for part in ("steps", "data", "evaluation", "saves")) / 3600
    if not history.starts:
        training = spent.hours
    hours = (asked - last["step"]) * training / last["step"]
    devices = history.starts[-1].devices if history.starts else 1
    return {
        "steps": asked,
        "tokens": round(last["tokens"] * asked / last["step"]),
        "hours": short(spent.hours + hours),
        "device_hours": short(spent.device_hours + devices * hours),
    }


def state_of(run_dir: str, history: History) -> str:
    """How a run ended, or whether it seems to run."""
    cause = history.starts[-1].cause if history.starts else _cause_of(run_dir)
    if cause:
        return safe(cause)
    silence = time.time() - Path(run_dir, METRICS).stat().st_mtime
    return "running" if silence < _SECONDS_OF_SILENCE else "no word of its end"


def _cause_of(run_dir: str) -> str:
    """How a run of an older version ended."""
    try:
        outcome = read_json(Path(run_dir, "outcome.json"), CheckpointError, 2**18)
    except CheckpointError:
        return ""
    return str(outcome.get("class", ""))[:_LONGEST_VALUE]


def starts_of(history: History) -> list[dict[str, Any]]:
    ends = {number: start.step for number, start in enumerate(history.starts)}
    for work in history.work:
        ends[work.start] = max(ends[work.start], work.step)
    starts = []
    for number, start in enumerate(history.starts):
        starts.append(
            {
                "began": start.began,
                "trains_from": start.trains_from,
                "ended": start.ended,
                "attempt": start.attempt,
                "from": start.step,
                "to": ends[number],
                "devices": start.devices,
                "strategy": safe(start.strategy),
                "cause": safe(start.cause),
            }
        )
    return starts


# --- settings and data


def settings_of(run_dir: str) -> dict[str, Any]:
    """The settings in config.yaml by their names, but for the run's folder; none if it is broken"""
    try:
        settings = read_yaml(Path(run_dir, "config.yaml"))
    except UserError:
        return {}
    settings.pop("run.dir", None)
    return settings


def spelled(value: Any) -> str:
    """A setting's value for a page."""
    try:
        text = spell(value)
    except TypeError:  # YAML has values that no setting has, such as dates
        text = str(value)
    text = safe(text)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + " …"


def defaults() -> dict[str, str]:
    return {name: spelled(_plain(info.default)) for name, info in FIELDS.items()}


def _plain(value: Any) -> Any:
    """A default as YAML has it."""
    return list(value) if isinstance(value, tuple) else value


def names_of_sources(line: Mapping[str, Any]) -> list[str]:
    names = [key.removeprefix("share_") for key in line if key.startswith("share_")]
    return names[:MOST_SOURCES]


def sources_of(
    run_dir: str, settings: Mapping[str, Any], last: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What a run trained on: its sources, their shares, and how often each was read through."""
    inputs = settings.get("data.sources")
    names = names_of_sources(last)
    if not names:
        source = _source("", settings.get("data.input"), run_dir, "data")
        source["share"] = 1.0
        source["tokens"] = last["tokens"]
        if source["size"]:
            source["passes"] = short(last["tokens"] / source["size"])
        return [source]
    sources = []
    for name in names:
        of_name = inputs.get(name) if isinstance(inputs, dict) else None
        where = of_name.get("input") if isinstance(of_name, dict) else of_name
        source = _source(name, where, run_dir, f"data/sources/{name}")
        share = number_in(last, f"share_{name}")
        source["share"] = short(share)
        source["asked"] = short(number_in(last, f"asked_{name}"))
        source["passes"] = short(number_in(last, f"passes_{name}"))
        source["tokens"] = short(share * last["tokens"])
        sources.append(source)
    return sources


def _source(name: str, where: Any, run_dir: str, folder: str) -> dict[str, Any]:
    """A source and its size, where the run or the source has a manifest of prepared tokens."""
    source: dict[str, Any] = {
        "name": safe(name),
        "input": spelled(where) if where else "",
        "size": None,
        "documents": None,
    }
    places = [Path(run_dir, folder)]
    if isinstance(where, str) and "://" not in where:
        places.append(Path(where))
    for place in places:
        try:
            manifest = read_json(place / "dataset.json", CheckpointError, _LARGEST_MANIFEST)
            train = manifest["splits"]["train"]
            source["size"] = int(train["tokens"])
            source["documents"] = int(train["documents"])
            break
        except (CheckpointError, KeyError, TypeError, ValueError):
            continue
    return source


# --- events


def events_of(
    lines: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], x_of: _Places
) -> list[dict[str, Any]]:
    """Spikes, what was stepped over, and figures that are not finite."""
    events = []
    for line in lines:
        if line.get("event") != "spike":
            continue
        text = safe(f"{line.get('reason', '')}; {line.get('done', '')}")
        events.append({"at": x_of(line.get("step", 0)), "kind": "spike", "text": text})
    for step in steps:
        for key in ("loss", "grad_norm"):
            value = step.get(key)
            if isinstance(value, float) and value - value != 0:
                text = f"{key} is {value}"
                events.append({"at": x_of(step["step"]), "kind": "not finite", "text": text})
    return events[:MOST_EVENTS]


def embed(data: Any) -> str:
    """JSON that may stand inside of HTML's <script>: no part of it ends the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
