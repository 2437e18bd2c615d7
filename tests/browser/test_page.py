"""The page of `report --html` in a real browser: what a reader sees, points at, drags and presses.

pytest -m browser tests/browser
"""

import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from dist_lm.metrics import read_lines
from dist_lm.report import main
from dist_lm.reporting.document import render, write_page
from dist_lm.reporting.facts import facts_of
from tests.browser.chromium import Chromium
from tests.reported_runs import (
    ATTACK,
    hostile_run,
    ordinary_run,
    start_line,
    step_line,
    write_lines,
)

pytestmark = pytest.mark.browser

LOSS = '[data-key="loss"]'
SVG = f'{LOSS} svg[role="img"]'


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs with other rates, at a price."""
    folder = tmp_path_factory.mktemp("pages")
    one = str(ordinary_run(folder / "one"))
    two = str(ordinary_run(folder / "two", steps=80, lr=2e-3))
    path = folder / "page.html"
    main([one, two, "--html", str(path), "--price", "2.5"])
    return path


def page_of(folder: Path, run: Path, **options: Any) -> Path:
    path = folder / "page.html"
    write_page(path, render([facts_of(run.name, str(run), list(read_lines(run)))], **options))
    return path


def texts(browser: Chromium, selector: str) -> list[str]:
    found: list[str] = browser.value(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)"
    )
    return found


def click(browser: Chromium, selector: str) -> None:
    box = browser.box(selector)
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.mouse(kind, box["left"] + box["width"] / 2, box["top"] + box["height"] / 2)


def drag(browser: Chromium, begin: float, end: float) -> None:
    """Over the loss chart, from one part of its width to another."""
    box = browser.box(SVG)
    y = box["top"] + box["height"] / 2
    x = [box["left"] + part * box["width"] for part in (begin, (begin + end) / 2, end)]
    browser.mouse("mouseMoved", x[0], y)
    browser.mouse("mousePressed", x[0], y)
    browser.mouse("mouseMoved", x[1], y)
    browser.mouse("mouseMoved", x[2], y)
    browser.mouse("mouseReleased", x[2], y)


def ticks(browser: Chromium) -> list[str]:
    """The labels below the loss chart; the last one names the axis."""
    return [text for text in texts(browser, f"{SVG} text") if text][-20:]


def zoom(browser: Chromium) -> list[float]:
    """The ends of what is in sight, as the address keeps them."""
    ends: list[float] = browser.value(
        "new URLSearchParams(location.hash.slice(1)).get('zoom').split(',').map(Number)"
    )
    return ends


def axis_name(browser: Chromium) -> str:
    return ticks(browser)[-1]


# --- it renders


def test_all_that_the_folders_tell_is_there(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert texts(browser, "h1") == ["one · two"]
    assert texts(browser, "h2") == [
        "Curves",
        "Evaluations",
        "Samples over time",
        "Where the hours went",
        "What it trained on",
        "Events",
        "Settings",
    ]
    charts = "Loss Held-out Gradient Learning Throughput Waiting arc".split()
    assert [text.split()[0] for text in texts(browser, "figure h3")] == charts
    assert "preemptedSIGTERM" in "".join(texts(browser, "#time td")).replace(": ", "")
    assert texts(browser, "#settings td .setting") == [
        *("optim.lr", "0.001", "0.002", "0.004"),
        *("run.steps", "120", "160", "400"),
    ]
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]


def test_each_validation_set_has_its_own_colour_and_marker(browser: Chromium, page: Path) -> None:
    browser.open(page)
    markers = browser.value(
        f"[...document.querySelectorAll('{LOSS} .legend .marker')].map("
        "e => [e.getAttribute('d').replace(/[-0-9.]+/g, ''), getComputedStyle(e).fill])"
    )
    (web, books, *others) = markers
    assert web[0] != books[0]
    assert len({color for _, color in markers}) == 4 and len(others) == 2


# --- the read-out


def test_hovering_reads_the_values_out(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert browser.value(f"document.querySelector('{LOSS} .tip').hidden")
    box = browser.box(SVG)
    browser.mouse("mouseMoved", box["left"] + box["width"] * 0.4, box["top"] + 100)
    assert not browser.value(f"document.querySelector('{LOSS} .tip').hidden")
    (title,) = texts(browser, f"{LOSS} .tip b")
    step = float(title.removeprefix("step "))
    rows = texts(browser, f"{LOSS} .tip div")
    (told,) = [row for row in rows if row.startswith("one: training")]
    found = re.fullmatch(r"one: training[\d.]+ smoothed, ([\d.]+)", told)
    assert found
    assert float(found[1]) == pytest.approx(step_line(round(step))["loss"], rel=1e-3)
    # All other charts show the same place.
    assert browser.value("document.querySelectorAll('.cursor').length") == 7
    browser.mouse("mouseMoved", 2, 2)
    assert browser.value("document.querySelectorAll('.cursor').length") == 0


def test_the_read_out_stays_inside_its_chart(browser: Chromium, page: Path) -> None:
    browser.open(page)
    for part in (0.1, 0.5, 0.97):
        box = browser.box(SVG)
        browser.mouse("mouseMoved", box["left"] + box["width"] * part, box["top"] + 100)
        left, right, chart_left, chart_right = browser.value(
            f"""(() => {{
                const tip = document.querySelector('{LOSS} .tip').getBoundingClientRect();
                const chart = document.querySelector('{LOSS}').getBoundingClientRect();
                return [tip.left, tip.right, chart.left, chart.right];
            }})()"""
        )
        assert chart_left <= left < right <= chart_right


# --- zoom and axes


def test_dragging_zooms_all_charts_and_a_button_resets(browser: Chromium, page: Path) -> None:
    browser.open(page)
    whole = ticks(browser)
    assert browser.value("document.querySelector('.reset').disabled")
    drag(browser, 0.5, 0.75)
    low, high = zoom(browser)
    assert 30 < low < 45 and 50 < high < 65  # of 80 steps
    zoomed = ticks(browser)
    assert zoomed != whole
    norm = texts(browser, '[data-key="grad_norm"] svg[role="img"] text')
    assert "0" not in norm and "40" in norm
    browser.open(page, fragment=browser.value("location.hash"))  # the address keeps it
    assert ticks(browser) == zoomed
    click(browser, ".reset")
    assert ticks(browser) == whole
    assert browser.value("location.hash") in ("", "#")
    assert browser.complaints() == []


def test_the_axis_changes_and_keeps_in_sight_what_is_in_sight(
    browser: Chromium, page: Path
) -> None:
    browser.open(page)
    drag(browser, 0.5, 0.75)
    zooms = {}
    units = {"tokens": "tokens", "hours": "minutes", "device_hours": "device hours", "cost": "cost"}
    for axis, name in units.items():
        click(browser, f'[data-value="{axis}"]')
        assert axis_name(browser) == name
        assert f"x={axis}" in browser.value("location.hash")
        zooms[axis] = zoom(browser)
    assert zooms["cost"] == pytest.approx([2.5 * end for end in zooms["device_hours"]], rel=1e-5)
    click(browser, '[data-value="step"]')
    low, high = zoom(browser)
    assert 30 < low < 45 and 50 < high < 65
    assert browser.complaints() == []


def heights(browser: Chromium) -> dict[float, float]:
    """Where the labels of the vertical axis of the loss chart stand."""
    found: dict[float, float] = browser.value(
        f"""Object.fromEntries([...document.querySelectorAll('{SVG} text[text-anchor="end"]')]
            .map((text) => [text.textContent, Number(text.getAttribute("y"))]))"""
    )
    return {float(label): place for label, place in found.items() if label[0].isdigit()}


def test_axes_may_be_logarithmic(browser: Chromium, page: Path) -> None:
    browser.open(page)
    click(browser, ".log-x")
    click(browser, f"{LOSS} .first")
    assert {"1", "2", "5", "10", "20", "50"} <= set(texts(browser, f"{SVG} text"))  # steps
    assert heights(browser)[4.0] - heights(browser)[6.0] == pytest.approx(
        heights(browser)[6.0] - heights(browser)[8.0], rel=1e-3
    )
    click(browser, f"{LOSS} .buttons button:last-child")
    assert heights(browser)[2.0] - heights(browser)[4.0] == pytest.approx(
        heights(browser)[4.0] - heights(browser)[8.0], rel=1e-3
    )
    assert "logx=1" in browser.value("location.hash")
    drawn = browser.value(f"document.querySelector('{SVG} .curve').getAttribute('d')")
    assert "NaN" not in drawn and "Infinity" not in drawn
    assert browser.complaints() == []


def test_a_price_gives_the_cost(browser: Chromium, page: Path) -> None:
    browser.open(page)
    cost = "#overview tbody tr:first-child td:last-child"
    assert texts(browser, cost) == ["3of about 6.333"]  # 1.2 device hours, and 1.33 more
    browser.value(
        "document.querySelector('.price').focus(); document.querySelector('.price').select()"
    )
    browser.key("5")
    assert texts(browser, cost) == ["6of about 12.67"]


def test_a_run_may_be_hidden(browser: Chromium, page: Path) -> None:
    browser.open(page)
    before = browser.value(f"document.querySelectorAll('{SVG} .curve').length")
    click(browser, ".bar .run-toggle")
    assert browser.value(f"document.querySelectorAll('{SVG} .curve').length") == before - 3
    assert browser.value("document.querySelector('#overview .run-toggle').ariaPressed") == "false"


def test_the_keyboard_does_what_the_mouse_does(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.value(f"document.querySelector('{SVG}').focus()")
    browser.key("Home")
    browser.key("ArrowRight")
    assert texts(browser, f"{LOSS} .tip b") == ["step 2"]
    browser.wait_for("document.getElementById('spoken').textContent.startsWith('step 2, one')")
    browser.key("+")
    assert "zoom=" in browser.value("location.hash")
    browser.key("Escape")
    assert "zoom=" not in browser.value("location.hash")


def test_samples_and_settings_are_chosen(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert texts(browser, "#samples pre")[:2] == ["Once there warm", "Once there was warm"]
    click(browser, '#samples [data-value="0.0"]')
    assert texts(browser, "#samples pre")[:2] == ["Once there cold", "Once there was cold"]
    click(browser, '#settings [data-value="all"]')
    browser.value("document.querySelector('#settings input').focus()")
    for letter in "steps":
        browser.key(letter)
    names = texts(browser, "#settings td:first-child")
    assert names == ["run.steps"]


# --- hostile runs


ODD = "#x=cost&zoom=NaN,2&logy=loss,__proto__&hide=0,9&price=-1&temperature=<i>&settings=x"


@pytest.mark.parametrize("fragment", ["", ODD])
def test_a_hostile_run_executes_nothing(browser: Chromium, tmp_path: Path, fragment: str) -> None:
    run = hostile_run(tmp_path / "hostile")
    path = tmp_path / "page.html"
    facts = facts_of(ATTACK, str(run), list(read_lines(run)))
    write_page(path, render([facts, facts], price=1.0))
    browser.open(path, fragment)
    for selector in ('[data-value="all"]', '[data-value="hours"]', ".log-x"):
        click(browser, selector)
    box = browser.box(SVG)
    browser.mouse("mouseMoved", box["left"] + 400, box["top"] + 100)
    assert browser.value("typeof window.hacked") == "undefined"
    assert browser.value("document.querySelectorAll('img, iframe, object, script').length") == 2
    assert ATTACK in texts(browser, "h1")[0]
    assert any(ATTACK in text for text in texts(browser, "#events td"))
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]


def test_the_policy_stops_a_script_that_got_in(browser: Chromium, tmp_path: Path) -> None:
    """The second wall: even markup that reached the file would do nothing."""
    path = page_of(tmp_path, ordinary_run(tmp_path / "run"))
    evil = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    path.write_text(path.read_text().replace('<div id="page">', evil + '<div id="page">'))
    browser.open(path)
    assert browser.value("typeof window.hacked") == "undefined"
    assert "Content Security Policy" in json.dumps(browser.complaints())
    assert len(texts(browser, "h2")) == 7  # the page itself works


# --- long runs, runs that go on


def test_a_hundred_thousand_steps_of_three_runs_are_quick(
    browser: Chromium, tmp_path: Path
) -> None:
    """A spike of one step is in sight, and the read-out says what a point stands for."""
    rng = random.Random(1)
    lines = [start_line(0, step=0, attempt=1)]
    for step in range(1, 100_001):
        loss = 3 + 7 * math.exp(-step / 3000) + rng.gauss(0, 0.05)
        lines.append(step_line(step, loss=loss + (step == 77_777) * 30, mfu=0.4, memory_gb=60.0))
    run = tmp_path / "run"
    run.mkdir()
    write_lines(run / "metrics.jsonl", lines)
    facts = facts_of("run", str(run), lines)
    path = tmp_path / "page.html"
    write_page(path, render([facts, facts, facts]))
    assert path.stat().st_size < 2_000_000
    began = time.monotonic()
    browser.open(path)
    assert time.monotonic() - began < 5
    top = max(float(text) for text in texts(browser, f"{SVG} text")[:7] if text.isdigit())
    assert top >= 30
    box = browser.box(SVG)
    browser.mouse("mouseMoved", box["left"] + box["width"] / 2, box["top"] + 100)
    row = texts(browser, f"{LOSS} .tip div")[0]
    assert re.search(r"smoothed, [\d.]+ \([\d.]+ to [\d.]+\)$", row), row
    assert "points of up to 50 steps" in texts(browser, "#curves .note")[0]


def test_a_page_that_follows_a_run_loads_itself_again_and_keeps_its_zoom(
    browser: Chromium, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [start_line(0, step=0, attempt=1), *(step_line(n) for n in range(1, 41))]
    write_lines(run / "metrics.jsonl", lines)
    path = page_of(tmp_path, run, reload_seconds=0.5)
    browser.open(path)
    drag(browser, 0.5, 0.75)
    chosen = browser.value("location.hash")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(step_line(41)) + "\n")
    page_of(tmp_path, run)  # the last one, which stays
    browser.wait_for("document.querySelector('#overview td:nth-child(3)')?.textContent == '41'")
    assert browser.value("location.hash") == chosen and "zoom=" in chosen
    assert browser.value("document.querySelector('.live')") is None


# --- other readers


def test_dark_and_light_have_contrast(browser: Chromium, page: Path) -> None:
    """Text against its ground by 4.5, and curves against theirs by 3, as WCAG AA asks."""
    browser.open(page)
    for scheme in ("light", "dark"):
        browser.emulate(scheme)
        found = browser.value(CONTRASTS)
        texts_on_ground = {name: found.pop(name) for name in INKS}
        assert min(texts_on_ground.values()) >= 4.5, (scheme, texts_on_ground)
        assert len(found) == 12 and min(found.values()) >= 3, (scheme, found)
        is_dark = browser.value("getComputedStyle(document.body).backgroundColor") != (
            "rgb(250, 249, 247)"
        )
        assert is_dark == (scheme == "dark")


CONTRASTS = """(() => {
    const style = getComputedStyle(document.documentElement);
    const rgb = (name) => {
        const text = style.getPropertyValue(name).trim();
        const full = text.length === 4 ? text.replace(/[0-9a-f]/gi, "$&$&") : text;
        return [1, 3, 5].map((at) => parseInt(full.slice(at, at + 2), 16) / 255);
    };
    const light = (name) => {
        const [r, g, b] = rgb(name).map(
            (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const ratio = (a, b) => {
        const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
        return (high + .05) / (low + .05);
    };
    const found = {};
    for (const ink of ["--ink", "--soft", "--bad", "--good"]) {
        found[ink] = Math.min(ratio(ink, "--panel"), ratio(ink, "--ground"));
    }
    for (let n = 0; n < 12; n++) found["--c" + n] = ratio("--c" + n, "--panel");
    return found;
})()"""
INKS = ("--ink", "--soft", "--bad", "--good")


def test_on_paper_there_are_no_buttons_and_light_colours(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.emulate("dark", media="print")
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    assert browser.value("getComputedStyle(document.querySelector('.bar')).display") == "none"
    browser.emulate("light")
    pages = len(re.findall(rb"/Type\s*/Page\b", browser.pdf()))
    assert 2 <= pages <= 8
    browser.wait_for(f"document.querySelector('{SVG}').viewBox.baseVal.width > 1000")  # as before


def test_a_small_screen_needs_no_scrolling_sideways(browser: Chromium, page: Path) -> None:
    for width in (390, 1024):
        browser.open(page, width=width)
        assert browser.value("document.documentElement.scrollWidth") <= width
