"""report.py: the table, the picture, and errors in one line."""

import json
import os
from unittest.mock import Mock

import pytest

from dist_lm.curves import draw_run
from dist_lm.errors import UserError
from dist_lm.report import main


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rate in (("slow", 100.0), ("fast", 200.0)):
        (tmp_path / name).mkdir()
        lines = [
            {
                "step": n,
                "loss": 4.0 - n,
                "lr": 1.0,
                "grad_norm": 1.0,
                "tokens": 1000 * n,
                "tokens_per_second": rate,
                "data_wait": 0.5,
            }
            for n in (1, 2, 3)
        ]
        if name == "fast":
            for step, loss in ((2, 1.25), (3, 1.5)):
                lines.append(
                    {
                        "step": step,
                        "val_set": "val",
                        "val_loss": loss,
                        "val_perplexity": 1,
                        "val_bits_per_byte": 0.9,
                    }
                )
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    return tmp_path


def add_evaluations(run, names):
    """Replace the evaluations by one of several sets, the later ones with lower losses."""
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "val" not in line]
    for number, name in enumerate(names):
        figures = {"val_loss": 1.5 - number / 10, "val_perplexity": 1, "val_bits_per_byte": 0.9}
        lines.append(json.dumps({"step": 3, "val_set": name, **figures}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_comparison(runs, capsys):
    main(["slow", "fast", "--output", "both.png"])
    assert capsys.readouterr().out.splitlines() == [
        "run   steps  tokens  tokens/s  time  data wait    loss  best val loss  bits per byte",
        "slow      3      3k       100  0:30      50.0%  1.0000              -              -",
        "fast      3      3k       200  0:15      50.0%  1.0000    1.2500 at 2         0.9000",
        "drawn: both.png",
    ]
    assert (runs / "both.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_is_that_of_the_set_that_decides(runs, capsys):
    """The first one of each evaluation, although another one's loss is lower."""
    add_evaluations(runs / "fast", ("zoo", "animals"))
    main(["fast", "--output", "x.png", "--json"])
    found = json.loads(capsys.readouterr().out)
    (run,) = found["runs"]
    assert (run["run"], run["steps"], run["seconds"]) == ("fast", 3, 15.0)
    assert (run["best"]["val_set"], run["best"]["val_loss"]) == ("zoo", 1.5)
    assert found["picture"] == "x.png"


def test_each_validation_set_has_its_own_colour_and_marker(runs):
    axes = Mock()
    add_evaluations(runs / "fast", ("zoo", "animals", "zoo of ema"))
    colors = (f"C{number}" for number in range(9))
    draw_run(axes, "fast", runs / "fast", colors)
    drawn = [how.kwargs for how in axes.plot.call_args_list if "marker" in how.kwargs]
    assert [how["label"] for how in drawn] == ["fast: zoo", "fast: animals", "fast: zoo of ema"]
    assert [how["color"] for how in drawn] == ["C1", "C2", "C3"]
    assert len({how["marker"] for how in drawn}) == 3


def test_where_the_picture_goes(runs):
    main(["slow"])
    assert (runs / "slow" / "loss.png").exists()
    main(["slow", "fast"])
    assert (runs / "comparison.png").exists()
    main(["--output", "flag-first.png", "fast"])
    assert (runs / "flag-first.png").exists()
    main(["slow", "--output", "between.png", "fast"])
    assert (runs / "between.png").exists()


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "usage: python -m dist_lm.report RUN [RUN ...] [--output PNG]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message", "code"),
    [
        (
            ["nowhere"],
            "nowhere/metrics.jsonl: No such file or directory; rule: the folder of a run that"
            " made a step",
            66,
        ),
        (["empty"], "empty: metrics.jsonl has no whole line of a step yet", 66),
        (["slow", "--outptu", "x.png"], "unknown flag --outptu; did you mean --output?", 2),
        (
            ["--output", "x.png"],
            "--output x.png: rule: python -m dist_lm.report RUN [RUN ...] [--output PNG] [--json]"
            " [--price PRICE] [--html FILE [--follow]]",
            2,
        ),
        (["slow", "--follow"], "--follow: needs a page to make; rule: --html FILE --follow", 2),
        (
            ["slow", "--html", "no/x.html"],
            "--html no/x.html: No such file or directory; rule: a file that can be written",
            2,
        ),
        (
            ["slow", "--html", "x.html", "--price", "-1"],
            "--price=-1 must be a number from 0 to 1e+06; nearest: 0",
            2,
        ),
        (
            ["slow", "--output", "no/x.png"],
            "--output no/x.png: No such file or directory; rule: a file that can be written",
            2,
        ),
    ],
)
def test_errors(runs, argv, message, code):
    (runs / "empty").mkdir()
    (runs / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError) as refusal:
        main(argv)
    assert (str(refusal.value), refusal.value.code) == (message, code)


BROKEN = [
    '{"loss": 1.0, "tokens": 1, "tokens_per_second": 1.0}',
    '{"step": "4", "loss": 1.0, "tokens": 1, "tokens_per_second": 1.0}',
    '{"step": 4, "loss": "x", "tokens": 1, "tokens_per_second": 1.0}',
    '{"step": 4, "loss": [1], "tokens": 1, "tokens_per_second": 1.0}',
    '{"step": 4, "loss": 1.0, "tokens": -1, "tokens_per_second": 1.0}',
    '{"step": 4, "loss": 1.0, "tokens": 1, "tokens_per_second": "nan"}',
    '{"step": 4, "loss": 1.0, "tokens": 1, "tokens_per_second": -1}',
    '{"step": 4, "loss": 1e300, "tokens": 1, "tokens_per_second": 1.0}',
    '{"step": 4, "loss": 1.0, "tokens": 1, "tokens_per_second": 1.0, "data_wait": "x"}',
    '{"step": -4, "loss": 1.0, "tokens": 1, "tokens_per_second": 1.0}',
    '{"step": 1e400, "loss": 1.0, "tokens": 1, "tokens_per_second": 1.0}',
    '{"step": 4, "val_loss": 1.0, "val_bits_per_byte": 1.0}',
    '{"step": 4, "val_set": [1], "val_loss": 1.0, "val_bits_per_byte": 1.0}',
    '{"step": 4, "val_set": "val", "val_loss": null, "val_bits_per_byte": 1.0}',
    '{"step": 4, "val_set": "val", "val_loss": 1.0, "val_bits_per_byte": "\\ud800"}',
    '{"loss": ' + "[" * 30_000,
    '{"step": ' + "9" * 5_000 + "}",
    '{"step": 4, "lo',
    "[1]",
    "null",
    "\0\0\0",
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_broken_line_is_passed_over_and_counted(runs, capsys, number):
    with open(runs / "fast/metrics.jsonl", "a") as file:
        file.write(BROKEN[number] + "\n")
    main(["slow", "fast", "--output", "both.png"])
    said = capsys.readouterr()
    assert said.err == "warning: fast/metrics.jsonl: 1 line is broken and was passed over\n"
    assert "fast      3      3k       200  0:15      50.0%  1.0000" in said.out


def test_a_line_without_an_end_takes_little_memory(runs, capsys):
    with open(runs / "fast/metrics.jsonl", "a") as file:
        file.write("x" * 200_000)
    main(["fast"])
    assert "4 lines are broken" in capsys.readouterr().err


def test_strange_figures_are_drawn(runs, capsys):
    lines = [
        {"step": 4, "loss": "nan", "tokens": 10, "tokens_per_second": 0.0},
        {"step": 2**48, "loss": "inf", "tokens": 9, "tokens_per_second": 1e-300},
        {"step": 2**48, "val_set": "\x1b[2J$\\frac", "val_loss": "inf", "val_bits_per_byte": 1e100},
        {"step": 5, "loss": 1e99, "tokens": 2**48, "tokens_per_second": 1e300},
    ]
    with open(runs / "fast/metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    main(["fast"])
    said = capsys.readouterr()
    assert said.err == "" and "\x1b" not in said.out


def test_a_pipe_is_no_history(runs):
    (runs / "fast/metrics.jsonl").unlink()
    os.mkfifo(runs / "fast/metrics.jsonl")
    with pytest.raises(UserError, match="not a regular file") as refusal:
        main(["fast"])
    assert refusal.value.code == 66
