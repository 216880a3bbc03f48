"""The rules of the house that a machine can check: who imports whom and by which name, how full folders are, who
prints."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("stages", "cluster", "pipeline")  # each may import those before it
# And each room those before it: a folder with all below it, or a file that lies loose among folders.
ROOMS = [
    *(
        "stages/errors",
        "stages/block_report",
        "stages/devices",
        "stages/device_errors",
        "stages/storage",
        "stages/precision",
        "stages/masks",
        "stages/model",
    ),
    *("stages/loading", "stages/sparsegpt", "stages/alps", "stages/statistics", "stages/text", "stages/data"),
    *("stages/shadow", "stages/criteria", "stages/allocation", "stages/metrics", "stages/refine"),
    *("stages/layer_rules", "stages/reconstruction", "stages/recipe", "stages/training", "stages/shard"),
    *("cluster/connection", "cluster"),
    *("pipeline/config", "pipeline/record", "pipeline/planning", "pipeline/reports", "pipeline/run"),
    *("pipeline/pruning", "pipeline/retraining", "pipeline/commands", "pipeline/weight_tracking", "pipeline/demo"),
    *("pipeline/cli", "pipeline/examples"),
]
OWNERS = {"ray": "cluster", "mlflow": "pipeline", "deepspeed": "stages"}  # what is imported in one room only
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
MOST_FILES = 12  # in a folder, beside __init__.py
UNWANTED_NAMES = ("print", "breakpoint", "NotImplementedError")
UNWANTED_IN_STAGES = ("os.environ", "os.getenv", "torch.manual_seed", "torch.random.manual_seed", "np.random.seed")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def room_of(module: str) -> str | None:
    """The room that a module, "stages.masks" or "pipeline.run.inputs", is in; None for a floor itself."""
    parts = module.split(".")
    return next((room for room in ("/".join(parts[:2]), parts[0]) if room in ROOMS), None)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in the file, those inside functions too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.lineno, node.module or ""


def test_every_file_is_in_a_room() -> None:
    assert len(FILES) > 30
    homeless = [path for path in FILES if room_of(module_of(path)) is None and path.stem != "__init__"]
    assert homeless == []
    assert {room for path in FILES if (room := room_of(module_of(path)))} == set(ROOMS)


def complaints(found: Iterator[tuple[Path, int, str]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}: {what}" for path, line, what in found]


def test_imports_run_one_way() -> None:
    def found() -> Iterator[tuple[Path, int, str]]:
        for path in FILES:
            floor, own = floor_of(path), room_of(module_of(path))
            foreign = {"tests"} | {package for package, owner in OWNERS.items() if owner != floor}
            for line, name in imported(path):
                first, _, inside = name.partition(".")
                if first in foreign:
                    yield path, line, f"{floor}/ imports {name}"
                other = room_of(inside) if first == "espalier" else None
                if own and other and ROOMS.index(other) > ROOMS.index(own):
                    yield path, line, f"{own} imports {other}, which comes after it"

    assert complaints(found()) == []


def test_everything_of_ours_is_imported_as_espalier() -> None:
    def found() -> Iterator[tuple[Path, int, str]]:
        for path in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "espalier").glob("*.py")]:
            for line, name in imported(path):
                if name.partition(".")[0] in FLOORS:
                    yield path, line, f"{name}: a user may have one of that name; write espalier.{name}"

    assert complaints(found()) == []


def test_no_folder_is_full() -> None:
    folders = Counter(path.parent for path in FILES if path.stem != "__init__")
    assert {str(folder.relative_to(ROOT)): files for folder, files in folders.items() if files > MOST_FILES} == {}


def test_nothing_prints_or_is_left_undone() -> None:
    def found() -> Iterator[tuple[Path, int, str]]:
        for path in FILES:
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.Name) and node.id in UNWANTED_NAMES:
                    yield path, node.lineno, node.id

    assert complaints(found()) == []


def test_stages_read_no_environment_and_leave_the_global_random_state() -> None:
    def found() -> Iterator[tuple[Path, int, str]]:
        for path in (path for path in FILES if floor_of(path) == "stages"):
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.Attribute) and (text := ast.unparse(node)) in UNWANTED_IN_STAGES:
                    yield path, node.lineno, text

    assert complaints(found()) == []


def test_files_begin_by_saying_what_they_are() -> None:
    def found() -> Iterator[tuple[Path, int, str]]:
        for path in FILES:
            text = path.read_text()
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
                    if floor_of(path) != "pipeline" and not ast.get_docstring(node):
                        yield path, node.lineno, f"{node.name} has no docstring"

    assert complaints(found()) == []


def test_no_file_names_a_machine() -> None:
    workplace = re.compile(r"(?<!\w)/work" + "/")
    for folder in (*FLOORS, "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not workplace.search(path.read_text()), path
