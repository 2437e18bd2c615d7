"""Damages the newest of two checkpoints in one way, and runs a command on the run.

The command may pass over the checkpoint or refuse it in one line. It must not end in a traceback,
hang, or call the damage a failure of the machine; and a valid checkpoint must be left.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_lm.checkpoint.folder import newest_valid
from dist_lm.config import DataConfig
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.errors import UserError
from tests.conftest import TINY, text_of
from tests.faults.signing import sign
from tests.procs import run, train

NEWEST = "step-00000004"
LIMIT_SECONDS = 60
REFUSALS = (2, 65, 66)  # config, data, checkpoint
JSON_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FILES = [
    *JSON_FILES,
    "state.json",
    "README.md",
    "manifest.json",
    "model.safetensors",
    "optimizer-00001-of-00001.safetensors",
]
DEEP = b"[" * 100_000

# What is done to a file.
MUTATIONS: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "flipped": lambda file: flip(file),
    "missing": lambda file: file.unlink(),
    "a link": lambda file: to_link(file),
    "a dangling link": lambda file: instead(file, lambda: file.symlink_to("/nowhere")),
    "a pipe": lambda file: instead(file, lambda: os.mkfifo(file)),
    "a folder": lambda file: instead(file, lambda: file.mkdir()),
    "deep": lambda file: file.write_bytes(DEEP),
    "of another type": lambda file: file.write_bytes(b"[1]"),
    "unreadable bytes": lambda file: file.write_bytes(b"\xff\xfe\x00" * 9),
}
# What is done to a file by somebody who signs it.
SIGNED: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "deep": lambda data: DEEP,
    "a list": lambda data: b"[1]",
    "an empty object": lambda data: b"{}",
    "text for every value": lambda data: texts_for_values(data),
    "huge numbers": lambda data: huge_numbers(data),
}
# What is done to the folder.
OF_FOLDER: dict[str, Callable[[Path], object]] = {
    "an extra file": lambda step: (step / "extra.bin").write_bytes(b"x"),
    "an extra folder": lambda step: (step / "extra").mkdir(),
    "a pickle": lambda step: (step / "pytorch_model.bin").write_bytes(b"cos\nsystem\n."),
    "renamed": lambda step: step.rename(step.with_name("step-00000099")),
    "linked": lambda step: step.rename(step.parent.parent / "far") and step.symlink_to("../far"),
    "linked to nowhere": lambda step: instead(step, lambda: step.symlink_to("/nowhere")),
    "a file": lambda step: instead(step, lambda: step.write_text("x")),
    "emptied": lambda step: instead(step, lambda: step.mkdir()),
    "copied above": lambda step: copy_above(step),
}
COMMANDS = ["train", "generate", "score", "show"]


@dataclass(frozen=True)
class Case:
    command: str
    file: str
    mutation: str
    is_signed: bool = False

    def __str__(self) -> str:
        signed = " and signed" if self.is_signed else ""
        return f"{self.command}: {self.file} {self.mutation}{signed}"

    def apply(self, step: Path) -> None:
        if self.file == "the folder":
            OF_FOLDER[self.mutation](step)
        elif self.is_signed:
            sign(step, self.file, SIGNED[self.mutation]((step / self.file).read_bytes()))
        else:
            MUTATIONS[self.mutation](step / self.file)


def all_cases() -> list[Case]:
    damages = [(file, mutation, False) for file in FILES for mutation in MUTATIONS]
    for file in FILES:
        if file != "manifest.json":
            damages += [(file, mutation, True) for mutation in SIGNED]
    damages += [("the folder", mutation, False) for mutation in OF_FOLDER]
    cases = []
    for damage in damages:
        cases += [Case(command, *damage) for command in COMMANDS]
    return cases


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def instead(path: Path, make: Callable[[], object]) -> None:
    """Put something else in the place of a file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make()


def to_link(file: Path) -> None:
    far = file.parent.parent.parent / f"far-{file.name}"
    file.rename(far)
    file.symlink_to(far)


def copy_above(step: Path) -> None:
    """A damaged copy under the name of a later step, as a stranger plants it."""
    planted = step.with_name("step-00000900")
    shutil.copytree(step, planted)
    manifest = json.loads((planted / "manifest.json").read_text())
    (planted / "manifest.json").write_text(json.dumps(manifest | {"step": 900}))
    os.truncate(planted / "model.safetensors", 100)


def texts_for_values(data: bytes) -> bytes:
    try:
        content = json.loads(data)
    except ValueError:  # a safetensors file
        return b"text" * 20
    return json.dumps(dict.fromkeys(content, "text")).encode()


def huge_numbers(data: bytes) -> bytes:
    try:
        content = json.loads(data)
    except ValueError:
        return b"\xff" * 8 + data[8:]
    for key, value in content.items():
        if type(value) in (int, float):
            content[key] = 10**15
    return json.dumps(content).encode()


class Bench:
    """A run with two checkpoints, and copies of it on which commands are run."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.txt").write_text(text_of(120))
        data = DataConfig(
            input=str(folder / "text.txt"), separator="\n\n", tokenizer="byte", val_fraction=0.1
        )
        prepare_dataset(data, folder / "shards", 1, say=lambda *_: None)
        self.flags = ["--data.input", str(folder / "shards"), "--run.save_every", "2"]
        self.flags += [
            *_without(TINY, "--run.save_every", "--run.steps"),
            "--run.eval_batches",
            "1",
        ]
        train(folder / "whole", *self.flags, "--run.steps", "4", "--run.trackers")

    def words(self, command: str, copy: Path) -> list[str]:
        if command == "train":
            words = ["dist_lm/train.py", "--run.dir", str(copy), "--run.steps", "6", *self.flags]
            return [*words, "--run.trackers"]
        if command == "generate":
            more = ["--ckpt", str(copy), "--prompt", "the", "--max_new_tokens", "3"]
        elif command == "score":
            more = ["--ckpt", str(copy), "--run.eval_batches", "1"]
        else:
            more = [str(copy), "--step", "3"]
        return ["-m", f"dist_lm.{command}", *more]

    def attempt(self, case: Case) -> str:
        """What went wrong, or nothing."""
        top = self.folder / "try"
        copy = top / "runs" / "run"
        shutil.copytree(self.folder / "whole", copy)
        try:
            case.apply(copy / NEWEST)
            words = [sys.executable, *self.words(case.command, copy)]
            try:
                done = run(words, timeout=LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                return f"it hung for {LIMIT_SECONDS} s"
            wrong = judge(done.returncode, done.stdout)
            if not wrong and case.command == "train":
                wrong = look_after_training(copy, done.returncode)
            return wrong
        finally:
            shutil.rmtree(top)


def judge(code: int, printed: str) -> str:
    """What is wrong with how a command ended."""
    if "Traceback" in printed:
        return f"a traceback: {printed.strip().splitlines()[-1]}"
    if code not in (0, *REFUSALS):
        return f"exit code {code}: {printed.strip()[-300:]}"
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    if code and len(errors) != 1:
        return f"{len(errors)} lines of error: {printed[-300:]}"
    if max(map(len, printed.splitlines()), default=0) > 10_000:
        return "a very long line"
    return ""


def look_after_training(run_dir: Path, code: int) -> str:
    try:
        newest, _ = newest_valid(run_dir)
    except UserError as error:
        return f"no valid checkpoint is left: {error}"
    if newest is None:
        return "no checkpoint is left"
    if code == 0 and newest.name != "step-00000006":
        return f"training ended at {newest.name}"
    return ""


def _without(words: list[str], *flags: str) -> list[str]:
    kept = []
    for flag, value in zip(words[::2], words[1::2], strict=True):
        if flag not in flags:
            kept += [flag, value]
    return kept


@contextmanager
def open_bench(folder: Path) -> Iterator[Bench]:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield Bench(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
