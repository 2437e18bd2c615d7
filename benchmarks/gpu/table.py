"""The result file as a table. Reads JSON only, so it works on any machine."""

from pathlib import Path
from typing import Any

from benchmarks.gpu.listing import BY_NAME
from benchmarks.gpu.resultfile import read_results


def markdown(header: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """One table: a row for each section, and below it one for each of its figures."""
    lines = [
        describe(header),
        "",
        "| section | what | figure | limit or target | |",
        "|---|---|---|---|---|",
    ]
    for result in in_order(results):
        lines.append(section_row(result))
        lines += [figure_row(row) for row in result.get("rows", [])]
    return "\n".join(lines) + "\n"


def describe(header: dict[str, Any]) -> str:
    """The machine in one line."""
    card = header.get("card")
    if card is None:
        card = "a dry run on a CPU: no figure of it says anything about a GPU"
    else:
        card = f"{header.get('cards', 1)} x {card}, driver {header.get('driver')}"
    parts = [str(header["date"]), card, f"torch {header.get('torch')}"]
    for name in ("cuda", "cudnn", "nccl", "deepspeed", "transformers"):
        if header.get(name):
            parts.append(f"{name} {header[name]}")
    if header.get("power_limit_watts"):
        parts.append(f"{header['power_limit_watts']} W, {header.get('clock_max_mhz')} MHz at most")
    parts.append(f"commit {header.get('commit')}")
    return "; ".join(parts) + "."


def in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of the list of sections. Runs that only fill the cache are left out."""
    names = list(BY_NAME)
    shown = [result for result in results if result["kind"] != "warm"]

    def place(result: dict[str, Any]) -> int:
        name = result["section"]
        return names.index(name) if name in names else len(names)

    return sorted(shown, key=place)


def section_row(result: dict[str, Any]) -> str:
    section = BY_NAME.get(result["section"])
    title = section.title if section else ""
    why = result.get("why", "")
    outcome = f"**{result['result']}**"
    if why:
        outcome += f": {clean(why)}"
    return f"| **{result['section']}** | {title} | {result.get('seconds', 0):g} s | | {outcome} |"


def figure_row(row: dict[str, Any]) -> str:
    limit = row.get("target", "")
    if "limit" in row:
        limit = f"<= {row['limit']:g}"
    verdict = ""
    if "ok" in row:
        verdict = "holds" if row["ok"] else "**does not hold**"
    elif "met" in row:
        verdict = "met" if row["met"] else "missed"
    figure = f"{number(row['value'])} {row.get('unit', '')}".strip()
    return f"| | {clean(row['what'])} | {clean(figure)} | {limit} | {verdict} |"


def number(value: Any) -> str:
    """Large numbers with commas, small ones as they are."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and abs(value) >= 10_000:
        return f"{value:,.0f}"
    return str(value)


def clean(text: str) -> str:
    """Text that fits into a cell."""
    return " ".join(text.split()).replace("|", "/")


def main(path: Path) -> None:
    print(markdown(*read_results(path)), end="")
