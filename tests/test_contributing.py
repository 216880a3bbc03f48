"""The recipes of .github/CONTRIBUTING.md, followed: their blocks are put into a copy of the tree, and what they add is
used there."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from family_models import family_checkpoint

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n# ([\w/.]+)(?:: (before|in) ([^\n]+))?\n(.*?)^```$", flags=re.M | re.S)
BLOCKS = BLOCK.findall((ROOT / ".github" / "CONTRIBUTING.md").read_text())
FILES = ("stages", "cluster", "pipeline", "tests")


def put(tree: Path, file: str, where: str, line: str, code: str) -> None:
    """One block of the document where its first line says; two blank lines around what is a definition."""
    path = tree / file
    if not where:
        assert not path.exists(), f"{file} is there already"
        path.write_text(code)
        return
    lines = path.read_text().splitlines(keepends=True)
    found = [number for number, text in enumerate(lines) if text.strip().startswith(line)]
    assert found, f"{file} has no line that begins with {line!r}"
    at = found[0] + (where == "in")
    if code.startswith(("def ", "@", "class ")):
        blank = "\n\n" if lines[at - 1].strip() else ""
        code = f"{blank}{code}\n\n"
    lines.insert(at, code)
    path.write_text("".join(lines))


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all recipes followed."""
    tree = tmp_path_factory.mktemp("followed") / "project"
    for name in FILES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copytree(ROOT / "espalier", tree / "espalier", symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tree)
    for block in BLOCKS:
        put(tree, *block)
    return tree


def run(tree: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Python in the copy, which is what it imports."""
    surroundings = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_each_recipe_has_its_blocks() -> None:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    recipes = re.split(r"^## How to add (?:a|an) ", text, flags=re.M)[1:]
    assert [recipe.partition("\n")[0] for recipe in recipes] == [
        "criterion", "refinement", "family", "reconstruction unit", "command",
    ]  # fmt: skip
    assert all(BLOCK.search(recipe.partition("\n## ")[0]) for recipe in recipes)


def test_what_the_recipes_add_keeps_to_the_house(tree: Path) -> None:
    changed = sorted({str(tree / file) for file, *_ in BLOCKS})
    run(tree, "-m", "ruff", "check", "-q", *changed)
    run(tree, "-m", "ruff", "format", "--check", "-q", *changed)
    run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_house.py")


PRUNED = """
import sys
from pathlib import Path

sys.path.insert(0, "tests/support")
import torch
from safetensors.torch import load_file
from family_models import family_checkpoint
from streaming import make_shards, prune

from espalier.pipeline.config.prune import PruneConfig

name, value = sys.argv[1:3]
home = Path(sys.argv[3])
model = family_checkpoint(home)("llama")
options = {"criterion": "wanda", "refine": "none", "reconstruct": "none"} | {name: value}
given = {"model": str(model), "output": "o", "calibration": "c", "learning_rate": 0.04}
tokens = torch.randint(1, 128, (8, 20), generator=torch.Generator().manual_seed(1))


def pruned(name, shards, options):
    recipe = PruneConfig(**given, **options).block_recipe
    reports = prune(make_shards(model, home / name, shards, 20, blocks=2, recipe=recipe), tokens)
    assert [report["sparsity"] for report in reports] == [0.5, 0.5]
    files = (home / name / "output").glob("*.safetensors")
    return {key: tensor for file in files for key, tensor in load_file(file).items()}, len(reports[0]["units"])


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


whole, units = pruned("whole", 1, options)
assert same(whole, pruned("cut", 2, options)[0]), "the same bytes on two shards"
before = {"criterion": "magnitude", "refine": "none", "reconstruct": "none"}
assert not same(whole, pruned("before", 1, before)[0])
print(units)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value", "units"),
    [("criterion", "spread", 0), ("refine", "smallest", 0), ("reconstruct", "masked-first", 2)],
)
def test_a_criterion_a_refinement_and_a_unit_prune_a_tiny_model(
    tree: Path, tmp_path: Path, option: str, value: str, units: int
) -> None:
    done = run(tree, "-c", textwrap.dedent(PRUNED), option, value, str(tmp_path))
    assert done.stdout.split()[-1] == str(units)


@pytest.mark.slow
def test_the_rooms_tests_take_what_the_recipes_add_by_its_name(tree: Path) -> None:
    files = (
        "criteria/test_criteria.py",
        "criteria/test_properties.py",
        "refine/test_refinement.py",
        "model/test_families.py",
    )
    chosen = ("-k", "spread or smallest or helium")
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:randomly")
    done = run(tree, "-m", "pytest", *options, *(f"tests/stages/{file}" for file in files), *chosen, "-rA")
    assert all(re.search(rf"PASSED .*\[.*{name}", done.stdout) for name in ("spread", "smallest", "helium")), (
        done.stdout
    )


@pytest.mark.slow
def test_a_command_answers_helps_and_refuses(tree: Path, tmp_path: Path) -> None:
    model = family_checkpoint(tmp_path)("llama")
    answer = json.loads(run(tree, "-m", "espalier", "size", str(model), "--json").stdout)
    assert answer["blocks"] == 2 and answer["parameters"] > 10_000
    assert "Example: espalier size" in run(tree, "-m", "espalier", "size", "--help").stdout
    refused = run(tree, "-m", "espalier", "size", str(tmp_path / "none"), code=2)
    assert refused.stderr.count("\n") == 1 and not refused.stdout
