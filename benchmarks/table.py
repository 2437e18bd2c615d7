"""The tables of results in the README and in docs/benchmarks.md, made from the result files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.claim import Claim
from benchmarks.running import figure_words

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- made by `python -m benchmarks --table`: do not edit -->"
END = "<!-- end of the table -->"

Entries = Mapping[str, Mapping[str, Any]]


def pages(claims: Sequence[Claim], entries: Entries) -> dict[Path, str]:
    """The two pages as they must be."""
    tables = {"README.md": short_table, "docs/benchmarks.md": long_table}
    found = {}
    for name, table in tables.items():
        path = ROOT / name
        found[path] = replace_table(path.read_text(encoding="utf-8"), table(claims, entries))
    return found


def rewrite(claims: Sequence[Claim]) -> None:
    for path, text in pages(claims, results.newest()).items():
        path.write_text(text, encoding="utf-8")


def replace_table(text: str, table: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "the page has a place for the table"
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def short_table(claims: Sequence[Claim], entries: Entries) -> str:
    lines = ["| claim | figure | target | command |", "|---|---|---|---|"]
    for claim in claims:
        entry = entries.get(claim.name)
        if entry is None:
            continue
        lines.append(
            f"| {claim.sentence} | {figure_words(dict(entry))} | {_target(claim, entry)} |"
            f" `python -m benchmarks {claim.name}` |"
        )
    return "\n".join(lines) + "\n"


def long_table(claims: Sequence[Claim], entries: Entries) -> str:
    lines = ["| claim | figure | target | both sides compute | of the same run | what was tried |"]
    lines.append("|---|---|---|---|---|---|")
    for claim in claims:
        entry = entries.get(claim.name)
        if entry is None:
            lines.append(
                f"| `{claim.name}`: {claim.sentence} | not measured yet | {claim.target.words()} |"
                f" | | {claim.tried} |"
            )
            continue
        lines.append(
            f"| `{claim.name}`: {claim.sentence} | {figure_words(dict(entry))} |"
            f" {_target(claim, entry)} | {entry['equal']} | {_circumstances(entry)} |"
            f" {claim.tried} |"
        )
    return "\n".join(lines) + "\n"


def _target(claim: Claim, entry: Mapping[str, Any]) -> str:
    words = claim.target.words()
    if not claim.target.is_met(entry["figure"]):
        words += ", missed"
    return words


def _circumstances(entry: Mapping[str, Any]) -> str:
    """The probe, other figures, and when and by which commit."""
    parts = [f"{name} {value}" for name, value in entry["probe"].items()]
    for name, value in entry["notes"].items():
        if name != "clock":
            parts.append(f"{name} {value}")
    threads = "1 thread" if entry["threads"] == 1 else f"{entry['threads']} threads"
    parts += [threads, entry["date"], entry["commit"]]
    return "; ".join(parts)
