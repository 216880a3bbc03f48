"""The rules of the house that a machine can check: who imports whom, how long files are, who prints."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("stages", "cluster", "pipeline")  # each may import those before it
OWNERS = {"ray": "cluster", "mlflow": "pipeline", "deepspeed": "stages"}  # what is imported in one room only
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
LONGEST_FILE = 335
UNWANTED_NAMES = ("print", "breakpoint", "NotImplementedError")
UNWANTED_IN_STAGES = ("os.environ", "os.getenv", "torch.manual_seed", "torch.random.manual_seed", "np.random.seed")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in the file, those inside functions too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.lineno, node.module or ""


def test_the_three_rooms_are_there() -> None:
    assert {room_of(path) for path in FILES} == set(ROOMS)
    assert len(FILES) > 30


def complaints(found: Iterator[tuple[Path, int, str]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}: {what}" for path, line, what in found]


def test_imports_run_one_way() -> None:
    def found() -> Iterator[tuple[Path, int, str]]:
        for path in FILES:
            room = room_of(path)
            forbidden = {*ROOMS[ROOMS.index(room) + 1 :], "tests"}
            forbidden |= {package for package, owner in OWNERS.items() if owner != room}
            for line, name in imported(path):
                if name.partition(".")[0] in forbidden:
                    yield path, line, f"{room}/ imports {name}"

    assert complaints(found()) == []


def test_nothing_prints_or_is_left_undone() -> None:
    def found() -> Iterator[tuple[Path, int, str]]:
        for path in FILES:
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.Name) and node.id in UNWANTED_NAMES:
                    yield path, node.lineno, node.id

    assert complaints(found()) == []


def test_stages_read_no_environment_and_leave_the_global_random_state() -> None:
    def found() -> Iterator[tuple[Path, int, str]]:
        for path in (path for path in FILES if room_of(path) == "stages"):
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.Attribute) and (text := ast.unparse(node)) in UNWANTED_IN_STAGES:
                    yield path, node.lineno, text

    assert complaints(found()) == []


def test_files_are_short_and_begin_by_saying_what_they_are() -> None:
    def found() -> Iterator[tuple[Path, int, str]]:
        for path in FILES:
            text = path.read_text()
            if text.count("\n") > LONGEST_FILE:
                yield path, LONGEST_FILE, "too long: cut it along its subject"
            if path.stem in ("utils", "util", "common", "helpers", "misc"):
                yield path, 1, "named after nothing: its owner has not been found yet"
            if text.strip() and not ast.get_docstring(tree_of(path)):
                yield path, 1, "no docstring"

    assert complaints(found()) == []


def test_public_functions_say_what_comes_out() -> None:
    """Everywhere: their return type. Where the work is done, in stages/ and cluster/, also a docstring."""

    def found() -> Iterator[tuple[Path, int, str]]:
        for path in FILES:
            for node in tree_of(path).body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    if node.returns is None:
                        yield path, node.lineno, f"{node.name} has no return type"
                    if room_of(path) != "pipeline" and not ast.get_docstring(node):
                        yield path, node.lineno, f"{node.name} has no docstring"

    assert complaints(found()) == []


def test_no_file_names_a_machine() -> None:
    workplace = re.compile(r"(?<!\w)/work" + "/")
    for folder in (*ROOMS, "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not workplace.search(path.read_text()), path
