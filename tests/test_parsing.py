"""Whatever stands in a YAML file, on a command line or in the environment: success or one line."""

import random
import time
from pathlib import Path

import pytest

from dist_lm.cli import load
from dist_lm.config import Config
from dist_lm.errors import UserError, one_line
from dist_lm.outcome import TRAIN, read
from tests.procs import ROOT, entry, train

SECONDS = 2


def bomb(section: str, aliases: int = 10, levels: int = 9) -> str:
    """Aliases of aliases: a few lines that mean 10^10 values."""
    lines = [f"{section}:", "  - &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for level in range(1, levels):
        lines.append(f"  - &a{level} [{', '.join([f'*a{level - 1}'] * aliases)}]")
    return "\n".join(lines)


FILES = {
    "bomb": bomb("model"),
    "text bomb": bomb("run").replace("1, 1", f"{'x' * 999}, 1"),
    "itself": "run: &a [*a]",
    "itself as a mapping": "run: &a {dir: *a}",
    "merged with itself": "run: &a {<<: *a}",
    "no hexadecimal number": "run: {steps: 0x_}",
    "too many digits": f"run: {{steps: {'9' * 5000}}}",
    "too many digits in base 60": f"run: {{steps: 1:{'1:' * 3000}1}}",
    "no whole number": "run: {steps: !!int x}",
    "no truth": "run: {compile: !!bool x}",
    "no number": "optim: {lr: !!float x}",
    "no time": "run: {dir: !!timestamp x}",
    "bytes": "run: {dir: !!binary x}",
    "a program": "run: {dir: !!python/object/apply:os.system [exit]}",
    "a list as key": "run: {? [1] : 2}",
    "a mapping as key": "run: {? {a: 1} : 2}",
    "deep lists": f"run: {'[' * 20_000}",
    "deep mappings": f"run: {'{a: ' * 20_000}",
    "long": "x" * 10_000_000,
    "a long value": f"run: {{steps: {'x' * 60_000}}}",
    "many keys": "run:\n" + "".join(f"  k{number}: 1\n" for number in range(200_000)),
    "zero bytes": "\0" * 100,
    "a null key": "null: {a: 1}",
    "a huge float": "optim: {lr: 1e999999999}",
    "infinitely many": "run: {steps: .inf}",
    "not a number": "run: {steps: .nan}",
    "an empty whole number": "run: {steps: !!int ''}",
}
COMMAND_LINES = {
    "a date": "--run.steps 2024-13-45",
    "an alias": "--optim.betas *a 0.9",
    "an equals sign": "--optim.betas = =",
    "a tag": "--run.steps !!int x",
    "too many digits": f"--run.steps {'9' * 5000}",
    "deep": f"--run.steps {'[' * 20_000}",
    "far from any divisor": "--model.width 99999999999 --model.heads 2000",
    "beyond a float": f"--model.width {'9' * 4000} --model.heads 7",
    "beyond int64": f"--data.seq_len {2**63}",
    "a billion layers": "--model.layers 1000000000",
    "a long name": f"--{'a' * 100_000} 1",
    "an endless file": "--config /dev/zero",
    "a folder": "--config /",
    "a date of base 60": f"--run.seed 1:{'1:' * 3000}1",
}


def answer(argv: list[str]) -> str:
    """Read a command line as train.py does: the error line, or nothing."""
    begin = time.monotonic()
    try:
        load(argv, TRAIN)
        line = ""
    except UserError as error:
        line = one_line(error)
        assert len(line.splitlines()) == 1 and len(line) < 3_000
    assert time.monotonic() - begin < SECONDS
    return line


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_answered_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(FILES[name])
    assert str(path) in answer(["--config", str(path)])


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_a_hostile_command_line_is_answered_in_one_line(name: str) -> None:
    assert answer(COMMAND_LINES[name].split(" "))


def test_a_huge_value_does_not_make_a_huge_error() -> None:
    """Beginning and end stay: the field and the rule."""
    error = UserError(f"optim.eps={'9' * 10_000}; rule: a small number")
    assert len(str(error)) < 2_100
    assert str(error).startswith("optim.eps=9") and str(error).endswith("; rule: a small number")


def test_a_date_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run: {dir: 2024-13-45}")
    config, _ = load(["--config", str(path)], TRAIN)
    assert config.run.dir == "2024-13-45"
    path.write_text(Config(run=config.run).to_yaml())
    assert load(["--config", str(path)], TRAIN)[0] == config


def test_an_alias_may_be_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: {sources: {a: &one {input: x}, b: *one}}")
    config, _ = load(["--config", str(path)], TRAIN)
    assert config.data.sources["a"] == config.data.sources["b"]


def test_the_nearest_divisors_are_named_as_before() -> None:
    assert "does not divide model.width=100; nearest: 5, 10" in answer(
        ["--model.width", "100", "--model.heads", "7"]
    )
    assert "does not divide model.width=8; nearest: 8" in answer(
        ["--model.width", "8", "--model.heads", "9"]
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DIST_LM_ATTEMPT", "abc"),
        ("DIST_LM_ATTEMPT", "9" * 5000),
        ("DIST_LM_STOP_AT", "abc"),
        ("DIST_LM_STOP_AT", "nan"),
        ("RANK", "abc"),
        ("RANK", "1"),
        ("WORLD_SIZE", "0"),
        ("LOCAL_WORLD_SIZE", "0"),
        ("MASTER_PORT", "\x1b[2J"),
    ],
)
def test_a_bad_environment_is_answered_in_one_line(name: str, value: str, tmp_path: Path) -> None:
    said = train(tmp_path, code=2, cold=True, **{name: value})
    assert said.startswith(f"error: {name}=") and len(said.splitlines()) == 1
    assert "\x1b" not in said


WORDS = (
    [
        " ",
        "\n",
        "\n  ",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "&a ",
        "*a",
        "!!",
        "!!int ",
        "!!float ",
    ]
    + [
        "? ",
        "|",
        ">",
        "'",
        '"',
        "#",
        "%",
        "@",
        "`",
        "<<",
        "=",
        "~",
        "null",
        "true",
        "0x",
        "0b",
        "0o",
    ]
    + ["1_0", "1e9", ".inf", ".nan", "-", "9" * 300, "2024-01-01", "1:30", "\t", "\0", "\x85", "é"]
    + [
        "\ud800",
        "model",
        "run",
        "data",
        "optim",
        "sources",
        "stages",
        "validation",
        "steps",
        "layers",
    ]
)


def mutated(text: str, rng: random.Random) -> str:
    """The text with a few pieces cut out, doubled or put in."""
    for _ in range(rng.randint(1, 4)):
        begin = rng.randrange(len(text) + 1)
        end = min(len(text), begin + rng.choice([0, 0, 1, 5, 40]))
        middle = rng.choice(["", text[begin:end] * 2, *rng.choices(WORDS, k=6)])
        text = text[:begin] + middle + text[end:]
    return text


def test_mutated_settings_never_end_in_a_traceback(tmp_path: Path) -> None:
    rng = random.Random(11)
    recipes = [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    path = tmp_path / "mutated.yaml"
    for _ in range(150):
        path.write_bytes(mutated(rng.choice(recipes), rng).encode(errors="surrogatepass"))
        answer(["--config", str(path)])
    lines = [
        "--model.width 64 --model.heads 4 --run.epochs null",
        "--optim.betas 0.9 0.95 --run.trackers a b --data.sources {a: {input: x, weight: 2}}",
        "--data.stages [{from_step: 1, weights: {a: 1}}] --optim.lr=1e-3 --launch zero2",
    ]
    for _ in range(600):
        words = mutated(rng.choice(lines), rng).split(" ")
        answer([word for word in words if word not in ("--help", "-h", "--print_config")])


@pytest.mark.parametrize(
    "content",
    [
        '{"class": 3, "step": "x", "attempt": "x"}',
        '{"class": "done", "attempt": 1e400}',
        '{"class": "odd", "step": 1, "reason": "", "attempt": 1, "failures": 0}',
        '{"class": "done", "step": -1, "reason": "", "attempt": 1, "failures": 0}',
        '{"class": "done", "step": 1, "reason": "", "attempt": 1, "failures": [1]}',
        "[" * 100_000,
        "[1]",
        "null",
        "9" * 5000,
    ],
)
def test_a_damaged_outcome_is_no_outcome(content: str, tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(content)
    assert read(tmp_path) == {}
    assert entry("outcome", "before", "--run.dir", str(tmp_path)) == f"1 {tmp_path}\n"
