"""The two sides of same_bits.py: trees of this repository, and how commands run in them.

Everything goes through the command lines that users type. Nothing of dist_lm is imported here,
because the two trees have different files.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 600  # seconds that one command may take
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "DIST_LM_")


@dataclass(frozen=True)
class Done:
    """What one command did."""

    code: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """The last line of stderr that is not empty: where a refused command says why."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else ""


@dataclass(frozen=True)
class Side:
    """One tree, and the folder that its commands may write to."""

    name: str  # base or new
    root: Path  # the tree
    work: Path  # scratch folder of this side
    inputs: Path  # made by the base, read by both sides
    renamed: Mapping[str, str] = field(default_factory=dict)  # its other names of settings
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def in_its_words(self, text: str) -> str:
        """A setting's name, or YAML with such names, as this tree spells them."""
        for old, new in self.renamed.items():
            text = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w.])", new, text)
        return text

    def plain(self, text: str) -> str:
        """Output without what differs between the sides by nature: the places of their folders."""
        places = {str(self.work): "WORK", str(self.inputs): "INPUTS", str(self.root): "ROOT"}
        for place in sorted(places, key=len, reverse=True):
            text = text.replace(place, places[place])
        return text

    def environment(self) -> dict[str, str]:
        """This environment without a launcher's variables, and with this tree before any installed
        one.
        """
        kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
        own = {
            "PYTHONPATH": str(self.root),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "120",
            "HF_HUB_OFFLINE": "1",  # no case needs the network
            "DIST_LM_CACHE": str(self.work / "cache"),
        }
        return {**kept, **own, **self.variables}

    def start(self, arguments: Sequence[str], **more: str) -> subprocess.Popen[str]:
        """Start Python in this tree.

        The process leads its own group, so that all of it can be ended.
        """
        return subprocess.Popen(
            [sys.executable, *(self.in_its_words(argument) for argument in arguments)],
            cwd=self.root,
            env=self.environment() | more,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *arguments: str, world: int = 1) -> Done:
        """Run one command on `world` processes, as torchrun would start them, and wait for all."""
        port = str(free_port())
        ranks = []
        for rank in range(world):
            variables = rank_variables(rank, world, port) if world > 1 else {}
            ranks.append(self.start(arguments, **variables))
        self.running.extend(ranks)
        try:
            outputs = [process.communicate(timeout=TIMEOUT) for process in ranks]
        except subprocess.TimeoutExpired:
            return Done(-1, "", f"nothing after {TIMEOUT} s")
        finally:
            for process in ranks:
                end(process)
                self.running.remove(process)
        failed = [process.returncode for process in ranks if process.returncode]
        stdout = "".join(out for out, _ in outputs)
        stderr = "".join(err for _, err in outputs)
        return Done(failed[0] if failed else 0, self.plain(stdout), self.plain(stderr))

    def end_all(self) -> None:
        """Kill what still runs, because nobody waits for it any more."""
        for process in list(self.running):
            end(process)

    def prove_tree(self) -> str:
        """Where Python finds dist_lm on this side; an error if that is not this side's tree.

        It is asked from another folder, so that the answer does not come from the current one.
        """
        question = "import dist_lm; print(dist_lm.__file__)"
        asked = subprocess.run(
            [sys.executable, "-c", question],
            cwd="/",
            env=self.environment(),
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        )
        found = asked.stdout.strip()
        assert Path(found) == self.root / "dist_lm" / "__init__.py", f"{self.name}: {found}"
        return found


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and those that it started, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def rank_variables(rank: int, world: int, port: str) -> dict[str, str]:
    """What torchrun tells a rank of one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"error: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def full_revision(name: str) -> str:
    return git("-C", str(ROOT), "rev-parse", "--verify", f"{name}^{{commit}}")


def check_out(revision: str, folder: Path) -> None:
    """A revision of this repository in a folder of its own. The repository itself is left alone."""
    if not folder.exists():
        git("clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(folder))
        git("-C", str(folder), "checkout", "--quiet", "--detach", revision)
