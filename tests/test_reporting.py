"""The page of `report --html`, without a browser: what it holds, and that no run writes code."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dist_lm import report
from dist_lm.evals import add_evals
from dist_lm.goodput import History
from dist_lm.metrics import read_lines, read_metrics
from dist_lm.report import main
from dist_lm.reporting.document import render
from dist_lm.reporting.facts import facts_of
from dist_lm.reporting.samples import MOST, read_samples
from dist_lm.reporting.series import POINTS, curve, middles, steps_a_point
from dist_lm.reporting.spending import spent_at_steps, spent_so_far
from tests.reported_runs import (
    ATTACK,
    hostile_run,
    ordinary_run,
    start_line,
    step_line,
    stop_line,
    write_lines,
)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text inside of scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self._is_inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._is_inside = tag in ("script", "style")
        if self._is_inside:
            self.inside.append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_inside = False

    def handle_data(self, data: str) -> None:
        if self._is_inside:
            self.inside[-1] += data


def data_of(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    content: dict[str, Any] = json.loads(match[1])
    return content


def facts(run: Path, name: str = "run") -> dict[str, Any]:
    return facts_of(name, str(run), list(read_lines(run)))


# --- curves


def test_a_short_run_keeps_each_step_and_a_long_one_its_extremes() -> None:
    assert steps_a_point(POINTS) == 1 and steps_a_point(POINTS + 1) == 2
    assert curve([1.0, 2.0], 1) == {"mean": [1.0, 2.0], "not_finite": 0}
    values = [1.0] * 10_000
    values[7_001] = 50.0
    values[7_002] = float("nan")
    size = steps_a_point(len(values))
    points = curve(values, size)
    assert size == 5 and len(points["mean"]) == 2000
    assert points["high"][1400] == 50.0 and points["low"][1400] == 1.0
    assert points["mean"][1400] == 53 / 4
    assert points["not_finite"] == 1
    assert middles(list(range(10)), 4) == [2, 6, 9]


def test_a_point_without_any_number_is_empty() -> None:
    points = curve([float("inf"), float("nan"), 3.0, 5.0], 2)
    assert points == {"mean": [None, 4.0], "low": [None, 3.0], "high": [None, 5.0], "not_finite": 2}


# --- hours


def test_hours_count_the_processes_of_all_starts_and_lost_work(tmp_path: Path) -> None:
    """Two devices, then eight; the time between does not count, and the work in it is lost."""
    lines = [start_line(0, step=0, attempt=1, devices=2), step_line(1), step_line(2)]
    lines += [start_line(10_000, 1, 2, tokens=1000, devices=8), step_line(2)]
    lines += [stop_line(10_200, 2, "done")]
    write_lines(tmp_path / "metrics.jsonl", lines)
    steps, _ = read_metrics(tmp_path)
    history = History(lines)
    places = spent_at_steps(history, steps)
    seconds = [(round(3600 * place.hours), round(3600 * place.device_hours)) for place in places]
    first = 60 + 10 + 10  # starting, and two steps
    assert seconds == [(70, 2 * 70), (first + 70, 2 * first + 8 * 70)]
    total = spent_so_far(history, places)
    assert round(3600 * total.device_hours) == 2 * first + 8 * 200
    assert history.device_hours() == pytest.approx(total.device_hours)


def test_steps_of_an_older_version_count_at_their_own_rate(tmp_path: Path) -> None:
    """It told of no starts."""
    lines = [step_line(1), step_line(2), start_line(500, 2, 2, tokens=2000), step_line(3)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    steps, _ = read_metrics(tmp_path)
    places = spent_at_steps(History(lines), steps)
    assert [round(3600 * place.hours) for place in places] == [10, 20, 20 + 70]


def test_what_a_run_has_taken_and_will_take(tmp_path: Path) -> None:
    total = facts(ordinary_run(tmp_path / "run"))["total"]
    assert (total["steps"], total["tokens"]) == (60, 60_000)
    assert total["hours"] == pytest.approx((60 + 300 + 60 + 300) / 3600, rel=1e-5)
    assert total["device_hours"] == pytest.approx((4 * 360 + 8 * 360) / 3600, rel=1e-5)
    expected = total["expected"]  # of 120 steps: 60 more at 10 s, on 8 devices
    assert (expected["steps"], expected["tokens"]) == (120, 120_000)
    assert expected["hours"] == pytest.approx((720 + 600) / 3600, rel=1e-5)
    assert expected["device_hours"] == pytest.approx((12 * 360 + 8 * 600) / 3600, rel=1e-5)


def test_the_price_gives_money(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(ordinary_run(tmp_path / "run"))
    page = str(tmp_path / "page.html")
    main([run, "--price", "2.5", "--html", page])
    assert "run took 1.20 device hours at 2.5: 3.00" in capsys.readouterr().out.splitlines()
    main([run, "--price", "2.5", "--html", page, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["runs"][0]["cost"] == pytest.approx(3.0)
    assert found["page"] == page and "picture" not in found
    assert data_of(Path(page).read_text())["price"] == 2.5


# --- what else the folder tells


def test_starts_have_their_devices_steps_and_causes(tmp_path: Path) -> None:
    found = facts(ordinary_run(tmp_path / "run"))
    keys = ("from", "to", "devices", "strategy", "cause")
    assert [tuple(start[key] for key in keys) for start in found["starts"]] == [
        (0, 30, 4, "ddp", "preempted: SIGTERM"),
        (30, 60, 8, "ddp", "done"),
    ]
    assert found["state"] == "done"
    (event,) = found["events"]
    assert event["at"][:2] == [30, 30_000]
    assert event["text"] == "loss=9 is far above 2; the run goes on"


def test_evaluations_have_their_place_on_each_axis(tmp_path: Path) -> None:
    found = facts(ordinary_run(tmp_path / "run"))
    web, books = found["validation"]
    assert (web["set"], web["loss"], books["loss"]) == ("web", [3.5, 3.0], [3.9, 3.4])
    assert web["at"][1] == [60, 60_000, 0.2, 1.2]
    (task,) = found["evaluations"]
    assert (task["task"], task["metric"], task["value"]) == ("arc", "acc", [0.25, 0.5])
    assert task["at"] == web["at"]


def test_each_metric_of_a_task_has_a_curve(tmp_path: Path) -> None:
    """Other shots, or a limit, make it another one; the last line of a step stands."""
    run = ordinary_run(tmp_path / "run")
    add_evals(
        run,
        [{"step": 60, "task": "arc", "metrics": {"acc": 0.75, "f1,a": 0.5, "f1_stderr,a": 0.2}}],
    )
    add_evals(run, [{"step": 60, "task": "arc", "shots": 5, "limit": 0.1, "metrics": {"acc": 1}}])
    with open(run / "evals.jsonl", "a") as file:
        file.write('{"step": "1"}\n[1]\n{"step": 1, "task": "arc", "metr')
    curves = facts(run)["evaluations"]
    keys = ("task", "metric", "value", "stderr")
    assert [tuple(curve[key] for key in keys) for curve in curves] == [
        ("arc", "acc", [0.25, 0.75], [0.01, None]),
        ("arc", "f1,a", [0.5], [0.2]),
        ("arc, 5 shots, limit 0.1", "acc", [1.0], [None]),
    ]


def test_samples_are_read_back_with_what_a_model_may_write(tmp_path: Path) -> None:
    texts = ["a\n```\nb", "temperature\n\n```python\n", "## step"]
    content = ""
    for step, text in enumerate(texts, 1):
        content += f"## step {step}, loss 2.5, no checkpoint of this step\nprompt 'x'\n"
        content += f"temperature 0.0\n```\n{text}\n```\n\n"
    content += "## step 2, loss 9.9\ntemperature 0.0\n```\nagain\n```\n\n"  # an older form
    (tmp_path / "samples.md").write_text(content)
    read = read_samples(tmp_path)
    assert [entry["texts"][0]["text"] for entry in read] == ["a\n```\nb", "again", "## step"]
    assert [entry["loss"] for entry in read] == ["2.5", "9.9", "2.5"]


def test_of_many_samples_some_are_kept_evenly(tmp_path: Path) -> None:
    entry = "## step {}, loss 1.0\ntemperature 0.0\n```\nx\n```\n\n"
    (tmp_path / "samples.md").write_text("".join(entry.format(n) for n in range(1, 101)))
    steps = [entry["step"] for entry in read_samples(tmp_path)]
    assert len(steps) == MOST and (steps[0], steps[-1]) == (1, 100)
    assert {b - a for a, b in pairwise(steps)} <= {4, 5}


def test_sources_have_their_size_where_the_run_has_it(tmp_path: Path) -> None:
    run = ordinary_run(tmp_path / "run")
    (run / "data").mkdir()
    manifest = {"splits": {"train": {"tokens": 30_000, "documents": 7}}}
    (run / "data/dataset.json").write_text(json.dumps(manifest))
    (source,) = facts(run)["sources"]
    assert (source["size"], source["documents"], source["passes"]) == (30_000, 7, 2.0)


def test_no_secret_of_a_url_is_on_the_page(tmp_path: Path) -> None:
    run = ordinary_run(tmp_path / "run")
    urls = "['https://me:hunter2@host/a.txt', 's3://b/c?X-Amz-Signature=hunter2&x=1']"
    (run / "config.yaml").write_text(f"data: {{input: {urls}}}\n")
    page = render([facts(run)])
    assert "hunter2" not in page and "https://host/a.txt" in page


def test_a_run_with_nothing_but_steps_has_a_page(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [step_line(1)])
    found = facts(tmp_path)
    assert found["settings"] == {} and found["samples"] == [] and found["starts"] == []
    assert found["state"] == "running" and found["total"]["expected"] is None
    assert data_of(render([found]))["runs"][0]["axes"]["step"] == [1]


# --- the file


def test_the_page_is_one_file_and_its_policy_allows_its_own_script_alone(tmp_path: Path) -> None:
    page = render([facts(ordinary_run(tmp_path / "run"))])
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 2
    for tag, attributes in elements.found:
        loads = {"src", "href", "srcset", "data", "action"} & set(attributes)
        assert not loads or attributes.get("href") == "#curves", (tag, attributes)
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert re.findall(r"https?://\S+?\"", page) == ['http://www.w3.org/2000/svg"']
    style, _, script = elements.inside
    (policy,) = [a["content"] for _, a in elements.found if "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none';")
    for text in (style, script):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_a_hostile_run_adds_no_element(tmp_path: Path) -> None:
    plain = Elements(render([facts(ordinary_run(tmp_path / "run"))]))
    page = render([facts(hostile_run(tmp_path / "hostile"), name=ATTACK)])
    assert [tag for tag, _ in Elements(page).found] == [tag for tag, _ in plain.found]
    block = page.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in block and "window.hacked" in block
    (run,) = data_of(page)["runs"]
    assert run["name"] == ATTACK  # it is there, as text
    assert "\u202e" not in page


def test_a_page_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    page.write_text("before")
    run = str(ordinary_run(tmp_path / "run"))
    monkeypatch.setattr("os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([run, "--html", str(page)])
    assert page.read_text() == "before"


def test_following_ends_when_the_runs_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is made again only when a run has written, and the last one stays as it is."""
    run = tmp_path / "run"
    run.mkdir()
    write_lines(run / "metrics.jsonl", [start_line(0, step=0, attempt=1), step_line(1)])
    page = tmp_path / "page.html"
    written = [None, step_line(2), stop_line(90, 1, "done")]
    pages = []

    def sleep(seconds: float) -> None:
        pages.append(page.read_text())
        line = written.pop(0)
        if line:
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    monkeypatch.setattr(report.time, "sleep", sleep)
    main([str(run), "--html", str(page), "--follow"])
    pages.append(page.read_text())
    shown = [data_of(text) for text in pages]
    assert pages[0] == pages[1]
    assert [data["runs"][0]["axes"]["step"] for data in shown] == [[1], [1], [1, 2], [1, 2]]
    assert [data["reload_seconds"] for data in shown] == [20, 20, 20, 0]
