"""The user's own modules that a run needs on other machines too: those that its criteria are in, file by file."""

import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

from espalier.stages.criteria.criterion import module_of


def own_files(criteria: Iterable[str]) -> dict[str, Path]:
    """Name to ship under -> file, for each module that one of `criteria` names and the packages it is in.

    What is installed is left out: the nodes have it, and a part of it would hide the whole there. So is what cannot be
    found: whoever imports it says so.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # as for the criterion's import
    installed = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")]
    files = {}
    for name in {module_of(criterion) for criterion in criteria} - {""}:
        parts = name.split(".")
        for module in accumulate(parts, "{}.{}".format):
            file = _file_of(module)
            if file is None or any(file.is_relative_to(folder) for folder in installed):
                break
            path = Path(*module.split("."))
            files[str(path / file.name if file.stem == "__init__" else path.with_suffix(file.suffix))] = file
    return files


def _file_of(module: str) -> Path | None:
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None


def criteria_of(options: Mapping[str, Any]) -> Iterator[str]:
    """The criteria that a recipe's options name, as YAML and run.json hold them."""
    for place in (options, *(options.get("overrides") or ())):
        if isinstance(place, Mapping) and isinstance(name := place.get("criterion"), str):
            yield name


def criteria_in(arguments: list[str]) -> Iterator[str]:
    """Those that a command line names, in its flags, its --config, or the run that it resumes."""
    from espalier.pipeline.config.options import read_yaml
    from espalier.pipeline.run.directory import recorded

    for flag, value in _flags(arguments):
        if flag == "--criterion":
            yield value
        elif flag == "--config":
            yield from criteria_of(read_yaml(Path(value)))
    if arguments[:1] == ["resume"]:
        for directory in arguments[1:]:
            run = recorded(Path(directory))
            yield from criteria_of({} if run is None else run["config"])


def _flags(arguments: list[str]) -> Iterator[tuple[str, str]]:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        yield flag, value if equals else following
