"""What the commands do to the machine, as Python's audit hooks see it."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.faults.audited import CHANGES_FILES, NETWORK, RUNS_CODE, read
from tests.faults.rows import row
from tests.procs import run
from tests.test_train import tiny

CONTROL = """
import os, pickle, subprocess, sys
from tests.faults import audited
audited.install(sys.argv[1])
pickle.loads(b"cos\\ngetpid\\n.")
os.system("true")
subprocess.run(["true"])
open(sys.argv[1] + "-x", "w").close()
os.remove(sys.argv[1] + "-x")
"""


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, in which pickles lie under every name that some loader reads."""
    folder = tmp_path_factory.mktemp("audit")
    words = tiny(prepared, "--run.steps", "2")
    run([sys.executable, "dist_lm/train.py", "--run.dir", str(folder / "run"), *words], check=True)
    for name in ("pytorch_model.bin", ".metadata", "optimizer.pt", "mp_rank_00_model_states.pt"):
        (folder / "run" / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    return folder / "run"


def audited(folder: Path, *command: str) -> list[tuple[str, str]]:
    """The events of a command that succeeds."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    done = run([sys.executable, "-m", "tests.faults.audited", str(log), *command])
    assert done.returncode == 0, done.stdout
    return read(str(log))


def commands(run_dir: Path, prepared: Path) -> dict[str, list[str]]:
    return {
        "train": ["dist_lm.train", "--run.dir", str(run_dir), *tiny(prepared, "--run.steps", "3")],
        "generate": ["dist_lm.generate", "--ckpt", str(run_dir), "--prompt", "the"],
        "score": ["dist_lm.score", "--ckpt", str(run_dir), "--run.eval_batches", "1"],
        "show": ["dist_lm.show", str(run_dir), "--step", "1"],
    }


@row(
    "code in files",
    fault="resume, generate, score and show on a run in which pickles lie under every name that"
    " a loader reads",
    must="nothing is unpickled, no program but git runs, no address is asked for, and nothing is"
    " written outside of the run folder and temporary folders",
)
@pytest.mark.parametrize("command", ["train", "generate", "score", "show"])
def test_no_code_runs_and_nothing_is_written_elsewhere(
    command: str, trained: Path, prepared: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    events = audited(tmp_path, *commands(copy, prepared)[command])
    ran = [what for event, what in events if event in RUNS_CODE]
    assert [what for what in ran if not what.startswith("git ")] == []
    assert [what for event, what in events if event in NETWORK] == []
    scratch = str(Path(tempfile.gettempdir(), "dist_lm-score-"))
    allowed = (f"{copy} ", f"{copy}/", scratch, "/dev/null")
    written = [what for event, what in events if event == "open" or event in CHANGES_FILES]
    assert [what for what in written if not what.startswith(allowed)] == []
    assert command != "train" or any("metrics.jsonl" in what for what in written)


def test_the_hook_sees_what_it_must(tmp_path: Path) -> None:
    """Without this, the test above would also pass if the hook heard nothing."""
    log = str(tmp_path / "log")
    run([sys.executable, "-c", CONTROL, log], check=True)
    seen = {event for event, _ in read(log)}
    assert {"pickle.find_class", "os.system", "subprocess.Popen", "open", "os.remove"} <= seen
