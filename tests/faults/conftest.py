"""What the tests of faults share."""

from pathlib import Path

import pytest

from tests.faults.operations import compile_shim


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preload shim, compiled once."""
    return compile_shim(tmp_path_factory.mktemp("shim"))
