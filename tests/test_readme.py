"""What tests/README.md promises is tested where it says."""

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
NAMED = re.compile(r"`((?:stages|cluster|pipeline)/(?:\w+/)*test_\w+\.py)(?:::(\w+))?`")
ROWS = [line for line in (TESTS / "README.md").read_text().splitlines() if line.startswith("| ") and "test_" in line]


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist() -> None:
    inputs = [row for row in ROWS if NAMED.search(row)]
    assert len(inputs) >= 40
    for row in inputs:
        for file, function in NAMED.findall(row):
            assert (TESTS / file).is_file(), row
            assert not function or function in functions(file), row
