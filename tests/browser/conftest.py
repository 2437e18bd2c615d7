"""Tests in a browser are a stage of their own: they run when asked for by `-m browser` alone."""

from collections.abc import Iterator

import pytest

from tests.browser.chromium import PROGRAM, Chromium


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "browser" not in config.getoption("markexpr"):
        items[:] = [item for item in items if "browser" not in item.keywords]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if not PROGRAM:
        pytest.skip("needs the Debian package chromium")
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()
