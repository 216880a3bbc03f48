"""`espalier submit -- ARGS`: the same command line, run as a job on a Ray cluster."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import typer

from cluster.jobs import submit

WRITTEN = ("--output", "--out")  # made absolute although they do not exist yet
READ = ("--calibration", "--eval", "--config", "--data", "--against")
FLAGS = ("--json",)  # take no value: what follows is an argument of its own
PASSED_ON = ("MLFLOW_", "HF_", "TRANSFORMERS_", "TOKENIZERS_")
SECRET_ENDINGS = ("TOKEN", "PASSWORD", "KEY", "SECRET", "AUTH")


def submit_command(
    args: list[str], *, address: str | None, follow: bool = True, on_line: Callable[[str], None] = typer.echo
) -> int:
    """Runs `espalier ARGS` as a Ray job and gives its exit code (0 at once with follow=False).

    The job runs in another directory, maybe on another machine: paths become absolute (see `absolute`), and what they
    name must be on storage that the nodes share. MLflow is the submitter's: MLFLOW_TRACKING_URI, else mlflow.db here.
    """
    entrypoint = ["python", "-m", "pipeline.cli", *absolute(args)]
    outcome = submit(entrypoint, address=address, env=job_environment(), on_line=on_line, follow=follow)
    return outcome.exit_code or 0


def absolute(args: list[str]) -> list[str]:
    """`args` with the paths made absolute.

    Those are: what follows --output and --out; and if it exists here, what follows another option that takes a path,
    any argument that belongs to no option, and any value with a slash in it. So a hub id stays a hub id, and
    `--criterion wanda` stays beside a directory named wanda. The command's name, first, stays too.
    """
    done = args[:1]
    for before, argument in itertools.pairwise(args):
        option, equals, value = argument.partition("=")
        if equals and option.startswith("--"):
            done.append(f"{option}={_absolute(value, option)}")
        else:
            done.append(_absolute(argument, before if before.startswith("--") and "=" not in before else ""))
    return done


def job_environment() -> dict[str, str]:
    """The variables that say where a run logs and downloads, as they are here, with MLflow's default filled in.

    Secrets stay here, because Ray shows a job's variables on its dashboard: set those on the nodes.
    """
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) and not name.endswith(SECRET_ENDINGS)
    }
    passed.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    return passed


def _absolute(value: str, option: str) -> str:
    if "://" in value or value.startswith("-"):
        return value
    is_path = option in WRITTEN or (os.path.exists(value) and (option in ("", *READ, *FLAGS) or os.sep in value))
    return os.path.abspath(value) if is_path else value
