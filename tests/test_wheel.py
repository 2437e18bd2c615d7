"""What a wheel installs works in another folder: commands, recipes, launch files, Slurm scripts."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from dist_lm import __main__ as dist_lm_command
from dist_lm.shipped import FOLDERS, files_of, recipes, shipped
from tests.procs import ROOT, clean_env

SHORT_RUN = "--config debug --run.steps 4 --run.eval_every 0 --run.trackers --run.dir run".split()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"]
    command += ["--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=120)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel; its dependencies are this one's."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", wheel], check=True, timeout=120)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but .pth files in it (an editable dist_lm) are not read.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder that has no checkout, without the tests' search path."""
    env = clean_env(PATH=f"{installed}:/usr/bin:/bin")
    env.pop("PYTHONPATH", None)
    env.pop("PYTHON", None)
    return subprocess.run(
        [*words], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )


def test_a_wheel_has_all_that_the_checkout_ships(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dist_lm").rglob("*.py")}
    for folder in FOLDERS:
        for file in files_of(folder):
            name = file.relative_to(shipped(folder)).as_posix()
            expected.add(f"dist_lm/_shipped/{folder}/{name}")
    for file in (ROOT / "dist_lm/reporting/page").iterdir():
        expected.add(f"dist_lm/reporting/page/{file.name}")
    expected.add("dist_lm/py.typed")
    in_package = {name for name in names if name.startswith("dist_lm/")}
    assert in_package == expected


@pytest.mark.slow
def test_a_wheel_trains_and_generates_in_another_folder(installed: Path, tmp_path: Path) -> None:
    trained = run(installed, tmp_path, "dist-lm", "launch", "--nproc", "2", *SHORT_RUN)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "-m dist_lm.train" in trained.stderr
    assert (tmp_path / "run" / "step-00000004" / "manifest.json").is_file()
    text = ["dist-lm", "generate", "--ckpt", "run", "--prompt", "def ", "--max_new_tokens", "8"]
    generated = run(installed, tmp_path, *text)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("def ")


def test_a_wheel_gives_its_scripts_to_edit(installed: Path, tmp_path: Path) -> None:
    copied = run(installed, tmp_path, "dist-lm", "init", "mine")
    assert copied.returncode == 0, copied.stderr
    assert (tmp_path / "mine" / "launch" / "kubernetes" / "jobset.yaml").is_file()
    edited = tmp_path / "mine" / "configs" / "debug.yaml"
    edited.write_text("model: {layers: 3}\n")
    again = run(installed, tmp_path, "dist-lm", "init", "mine")
    assert "mine: 0 files copied" in again.stdout
    assert edited.read_text() == "model: {layers: 3}\n"
    command = ["mine/launch/torchrun.sh", "--dry-run", "--nproc", "2", *SHORT_RUN]
    dry = run(installed, tmp_path, *command)
    assert dry.returncode == 0, dry.stderr
    assert " -m dist_lm.train --launch ddp --config debug" in dry.stdout + dry.stderr


def test_recipes_have_names() -> None:
    files = (ROOT / "configs").glob("*.yaml")
    assert set(recipes()) == {file.stem for file in files}


def test_the_command_lists_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    dist_lm_command.main([])
    page = capsys.readouterr().out
    dist_lm_command.main(["recipes"])
    listed = capsys.readouterr().out
    for name in (*dist_lm_command.COMMANDS, *dist_lm_command.OWN_COMMANDS):
        assert f"  {name} " in page
    for name in recipes():
        assert f"{name} " in listed
    assert "needs" in listed


def test_every_command_of_the_package_has_a_name() -> None:
    with_entry = set()
    for file in (ROOT / "dist_lm").glob("*.py"):
        if "\n    run_entry(main" in file.read_text():
            with_entry.add(file.stem)
    assert with_entry - {"__main__", "outcome"} == set(dist_lm_command.COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no such command; did you mean train?"),
        (["qqqqqq"], "no such command; rule: one of train, prepare,"),
        (["init"], "dist-lm init DIR"),
        (["init", "/proc/nowhere"], "/proc/nowhere: "),
    ],
)
def test_a_wrong_command_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(dist_lm_command.UserError, match=message.replace("?", r"\?")):
        dist_lm_command.main(words)
