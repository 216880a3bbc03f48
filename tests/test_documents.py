"""Whatever the documents name exists: files, links, options, and in run.json's table every field."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from espalier.pipeline.cli.flags import with_all_options
from espalier.pipeline.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md", "tests/README.md")),
    *(ROOT / floor / "README.md" for floor in ("stages", "cluster", "pipeline")),
    *(ROOT / folder / "README.md" for folder in ("cluster/deploy", "tests/benchmarks")),
]
READMES = ["README.md", "stages/README.md", "cluster/README.md", "pipeline/README.md"]
PATH = re.compile(r"`((?:stages|cluster|pipeline|tests|espalier)/[\w/.-]*)`")
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)[^)]*\)")
NAMED = re.compile(r"`(\w+)` in `((?:stages|cluster|pipeline|tests)/[\w/]+\.py)`")
MODULE = re.compile(r"`?espalier((?:\.[a-z_]+)+)")
FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z-]+)")
OTHERS = {"--backend-store-uri", "--debug", "--generate", "--help"}  # of mlflow; of every command; of ray; of typer


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    text = re.sub(r"^```python\n.*?^```$", "", document.read_text(), flags=re.M | re.S)  # those are run by tests
    for path in PATH.findall(text):
        assert (ROOT / path).exists() or document.parent == ROOT / "tests", f"{document}: {path}"
    for link in LINK.findall(text):
        assert (document.parent / link).exists(), f"{document}: {link}"
    for name, path in NAMED.findall(text):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{document}: {name} in {path}"
    for dotted in MODULE.findall(text):
        parts = dotted.strip(".").split(".")
        if parts[0] in ("stages", "cluster", "pipeline") and len(parts) > 1:
            place = ROOT.joinpath(*parts)
            assert place.is_dir() or place.with_suffix(".py").exists(), f"{document}: espalier{dotted}"


@cache
def flags() -> set[str]:
    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    made = [parameter for command in commands for parameter in with_all_options(command).params]
    return {flag for parameter in made for flag in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("document", READMES)
def test_the_options_that_a_readme_names_exist(document: str) -> None:
    named = set(FLAG.findall((ROOT / document).read_text()))
    assert len(named) > 3
    assert named - flags() - OTHERS == set()


def commands_of(text: str) -> list[list[str]]:
    """The command lines of `espalier` in a document's blocks, without `espalier` itself."""
    blocks = "\n".join(re.findall(r"^```(?:sh)?\n(.*?)^```$", text, flags=re.M | re.S)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines() if line.startswith("espalier ")]
    return [line[1:] for line in lines]


@pytest.mark.parametrize("document", [document for document in READMES if document != "stages/README.md"])
def test_the_commands_that_a_readme_shows_are_understood(document: str) -> None:
    commands, shown = get_command(app).commands, commands_of((ROOT / document).read_text())  # type: ignore[attr-defined]
    assert len(shown) > 2
    for name, *arguments in shown:
        with_all_options(commands[name]).make_context(name, arguments)


def test_the_readme_is_two_screens_and_shows_the_commands_of_a_first_day() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 145
    assert {"doctor", "plan", "prune", "eval", "submit", "compare"} <= {name for name, *_ in commands_of(text)}
