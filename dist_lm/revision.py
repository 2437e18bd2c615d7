"""Which code runs: its version, a hash of its files, and its commit.

Ranks compare the version before they train, and each checkpoint keeps the commit.
"""

import hashlib
import subprocess
from functools import cache
from pathlib import Path

from dist_lm import __version__

_PACKAGE = Path(__file__).parent


def version_and_hash() -> str:
    """The version, and a short hash of every Python file of this package: `0.1.0 (8d969eef)`."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:8]})"


@cache
def git_commit() -> str | None:
    """The commit of the code that runs, where it runs from a checkout."""
    command = ["git", "-C", str(_PACKAGE), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
