"""What the tests of faults share."""

import os
from pathlib import Path

import pytest

from tests.faults.operations import compile_shim


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preload shim, compiled once for all workers, which share a fork server that has it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return compile_shim(folder)
