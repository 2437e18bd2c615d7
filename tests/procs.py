"""Start dist_lm in fresh processes: plain commands, or one process a rank with gloo between them.

Every call has a timeout, after which all its processes are killed and their output is part of the failure.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def clean_env(**more: str) -> dict[str, str]:
    """This environment without what a launcher would set, so that tests behave alike wherever they run."""
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "ACCELERATE_",
        "TORCHELASTIC_",
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    return {**kept, "PYTHONUNBUFFERED": "1", "COLUMNS": "120", **more}


def start_ranks(world: int, *command: str, **env: str) -> list[subprocess.Popen[str]]:
    """One process a rank, as torchrun would start them."""
    port = str(free_port())
    ranks = []
    for rank in range(world):
        own = (
            {}
            if world == 1
            else {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        )
        ranks.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=clean_env(**own, **env),
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return ranks


def finish(ranks: list[subprocess.Popen[str]], timeout: float = 240) -> tuple[int, str]:
    """Wait for all; the first exit code that is not 0, and all they printed."""
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    except subprocess.TimeoutExpired:
        for rank in ranks:
            rank.kill()
        raise AssertionError(
            "timed out; printed:\n" + "\n".join(rank.communicate()[0] for rank in ranks)
        ) from None
    return next((rank.returncode for rank in ranks if rank.returncode), 0), "\n".join(outputs)


def train(run_dir: Path, *arguments: str, world: int = 1, code: int = 0, **env: str) -> str:
    """Run train.py to its end on `world` processes; what it printed. Fails unless it exits with `code`."""
    got, output = finish(
        start_ranks(world, "dist_lm/train.py", "--run.dir", str(run_dir), *arguments, **env)
    )
    assert got == code, f"exit code {got}, not {code}:\n{output}"
    return output


def entry(
    module: str,
    *arguments: str,
    code: int = 0,
    stdin: str | None = None,
    timeout: float = 240,
    **env: str,
) -> str:
    """Run `python -m dist_lm.MODULE`; what it printed on both channels. Fails unless it exits with `code`."""
    done = subprocess.run(
        [sys.executable, "-m", f"dist_lm.{module}", *arguments],
        cwd=ROOT,
        env=clean_env(**env),
        text=True,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    assert done.returncode == code, f"exit code {done.returncode}, not {code}:\n{done.stdout}"
    return done.stdout
