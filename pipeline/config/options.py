"""Options as they are given, by name in YAML, on the command line and in Python, made into a checked configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from espalier.stages.errors import Refusal, unknown

Config = TypeVar("Config", bound=BaseModel)
Count = Annotated[int, Field(ge=1)]


class Panel(Enum):
    """The panel of a command's help that a field's flag is shown in, as a mark beside its type; without one WHERE.

    They are shown in this order, and in each its flags in the order of the fields, a base class's first.
    """

    WHAT = "What"
    MASKS = "Masks"
    RECONSTRUCTION = "Reconstruction"
    TRAINING = "Training"
    SHADOW = "Shadow"
    TEXT = "Text"
    WHERE = "Where and how it runs"
    RECORD = "Record"


@dataclass(frozen=True, slots=True)
class Before:
    """A mark beside a field's type: the help shows its flag before that of the field `name`."""

    name: str


# What the commands that read text say alike.
BOS_HELP = (
    "The token that begins a text, put before each document; window: at the head of each window too; none: nowhere, "
    "and the end-of-text token between documents; auto: before each document if the tokenizer does so itself, and for "
    "Gemma, which needs it, as window."
)
COLUMN_HELP = "Column of the records that holds the text, nested ones as data.text; default: found by name and content."


def _window(value: int | str) -> int | str:
    if isinstance(value, int) and value < 2:
        raise Refusal(f"length {value}: a window must have at least 2 tokens")
    return value


Length = Annotated[int | Literal["auto"], AfterValidator(_window)]


def build_config(values: Mapping[str, Any], kind: type[Config]) -> Config:
    """A checked configuration. Raises Refusal, one line, for an unknown or missing name and for a bad value."""
    known = list(kind.model_fields)
    for name in values:
        if name not in known:
            raise Refusal(f"option {name!r} {unknown(name, known, 'options')}")
    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "configuration"
        if isinstance(cause := problem.get("ctx", {}).get("error"), Refusal):
            raise cause from None
        if problem["type"] == "missing":
            written = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise Refusal(f"option {name} is missing; give {written} or put it in the YAML") from None
        raise Refusal(f"option {name} = {problem['input']!r}: {problem['msg'].lower()}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of a YAML file, dashes and underscores alike. Raises Refusal if it is no mapping of options."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise Refusal(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise Refusal(f"{path}: must hold options, one `name: value` a line")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def located(config: Config, *names: str) -> Config:
    """`config` with its output, and those of the options `names` that name something here, as absolute paths: so the
    run can be gone on with from any directory."""
    given: dict[str, Any] = {name: getattr(config, name) for name in ("output", *names)}
    paths = {
        name: str(Path(value).expanduser().absolute())
        for name, value in given.items()
        if name == "output" or (isinstance(value, str) and value and Path(value).expanduser().exists())
    }
    return config.model_copy(update=paths)
