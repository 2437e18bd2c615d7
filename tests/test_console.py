"""Standard output and standard error may be gone: closed, without a reader, on a full disk."""

import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm.console import dispensable, printable
from dist_lm.disk import open_own
from tests.conftest import TINY, text_of
from tests.procs import ROOT, clean_env

# How a shell takes a stream away.
GONE = [
    ">&-",
    "2>&-",
    ">&- 2>&- <&-",
    "| true",
    "| head -1",
    "2>&1 | true",
    ">/dev/full",
    "2>/dev/full",
]


def without(gone: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours in a shell that takes a stream away."""
    # The command waits until the reader of the pipe has ended.
    script = f'set -o pipefail; (sleep 0.2; exec "$0" "$@") {gone}'
    env = clean_env()
    del env["PYTHONUNBUFFERED"]
    command = ["bash", "-c", script, sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("gone", GONE)
def test_a_result_that_nobody_takes(gone: str) -> None:
    """A reader that has seen enough is no error, a result that could not be written is one."""
    done = without(gone, "-m", "dist_lm.outcome", "before", "--run.dir", "/nonexistent/x")
    is_lost = gone == ">/dev/full"
    assert done.returncode == (70 if is_lost else 0), done.stderr
    expected = (
        "error: standard output: No space left on device; rule: a place that can be written\n"
    )
    assert done.stderr == (expected if is_lost else "")


@pytest.mark.parametrize("gone", ["| true", "2>&1 | true", ">/dev/full", "2>/dev/full", "2>&-"])
def test_an_error_keeps_its_code(gone: str) -> None:
    done = without(gone, "-m", "dist_lm.outcome", "before", "--run.stepps", "3")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    script = (
        "import sys; from dist_lm.errors import run_entry\n"
        "def main(argv):\n"
        "    file = open(argv[0], 'w'); print('a line'); assert file.fileno() > 2\n"
        "    print('another', file=sys.stderr); assert not sys.stdin.read()\n"
        "run_entry(main, prints_result=False)"
    )
    done = without(">&- 2>&- <&-", "-c", script, str(tmp_path / "file"))
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("gone", ["| true", ">/dev/full"])
def test_a_command_by_its_short_name_outlives_them_too(gone: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text(text_of(100))
    words = ["--input", str(tmp_path / "in.txt"), "--tokenizer", "byte"]
    done = without(gone, "-m", "dist_lm", "prepare", *words, "--output", str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made/dataset.json").exists()


# One of each kind: closed, without a reader from the start and later, on a full disk.
@pytest.mark.slow
@pytest.mark.parametrize(
    "gone",
    [
        pytest.param(">&-", marks=pytest.mark.campaign),
        pytest.param("2>&-", marks=pytest.mark.campaign),
        ">&- 2>&- <&-",
        pytest.param("| true", marks=pytest.mark.campaign),
        "| head -1",
        "2>&1 | true",
        ">/dev/full",
        "2>/dev/full",
    ],
)
def test_a_run_outlives_its_streams(gone: str, tmp_path: Path) -> None:
    """Text is prepared in the run, which prints too."""
    (tmp_path / "in.txt").write_text(text_of(100))
    where = ["--data.input", str(tmp_path / "in.txt"), "--run.dir", str(tmp_path / "run")]
    flags = [*TINY, "--data.tokenizer", "byte", "--run.trackers"]
    done = without(gone, "dist_lm/train.py", *flags, *where)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "run/step-00000012/manifest.json").exists()


def test_a_file_that_a_run_can_do_without_costs_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "victim").touch()
    path = tmp_path / "samples.md"
    path.symlink_to(tmp_path / "victim")
    for _ in range(3):
        with dispensable(path), open_own(path, "a") as file:
            file.write("x")
    with dispensable(path), open("/dev/full", "w") as file:
        file.write("x")
    assert (tmp_path / "victim").read_text() == ""
    reasons = ["Too many levels of symbolic links", "No space left on device"]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path} could not be written, the run goes on: {reason}" for reason in reasons
    ]


def test_what_drives_a_terminal_never_reaches_one() -> None:
    done = without("", "-m", "dist_lm.outcome", "before", "--run.\x1b[2Jx", "3")
    assert done.stderr.startswith("error: ") and "\x1b" not in done.stdout + done.stderr
    assert printable("\x1b[31m\u202e") == "\\x1b[31m\\u202e"
