"""docs/faults.md is what the command writes, and every row has a test that exists."""

import ast

from tests.faults import table
from tests.faults.rows import ROWS
from tests.procs import ROOT


def test_the_page_is_what_the_command_writes() -> None:
    table.import_rows()
    page = table.PAGE.read_text()
    for name in ROWS:
        assert f"| {name} |" in page, f"run python -m tests.faults.table: no row {name!r}"
    assert page == table.page()


def test_every_row_has_a_test() -> None:
    table.import_rows()
    for row in ROWS.values():
        file, _, name = row.test.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in tests, row
