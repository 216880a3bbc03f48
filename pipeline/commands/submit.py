"""`espalier submit -- ARGS`: the same command line, run as a job on a Ray cluster."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from espalier.cluster.connection.jobs import NOTHING_MORE, SHIPPED, JobNeeds, checked_runtime_env, submit
from espalier.cluster.connection.redact import is_secret, without_credentials
from espalier.pipeline.config.options import read_yaml
from espalier.pipeline.record.mlflow_client import default_tracking_uri
from espalier.pipeline.run.own_modules import criteria_in, own_files
from espalier.stages.errors import Refusal

WRITTEN = ("--output", "--out")  # made absolute although they do not exist yet
READ = ("--calibration", "--eval", "--config", "--data", "--against")
FLAGS = ("--json",)  # take no value: what follows is an argument of its own
PASSED_ON = ("MLFLOW_", "HF_", "TRANSFORMERS_", "TOKENIZERS_")


def submit_command(
    args: list[str],
    *,
    address: str | None,
    follow: bool = True,
    on_line: Callable[[str], None] = typer.echo,
    needs: JobNeeds = NOTHING_MORE,
) -> int:
    """Runs `espalier ARGS` as a Ray job and gives its exit code (0 at once with follow=False).

    The job runs in another directory, maybe on another machine: paths become absolute (see `absolute`), and what they
    name must be on storage that the nodes share, or in the working directory that goes along (see `shipped`). MLflow
    is the submitter's: MLFLOW_TRACKING_URI, else mlflow.db here. Raises Refusal for a URI with credentials in `args`.
    """
    for argument in args:
        if without_credentials(argument) != argument:
            raise Refusal(
                f"submit: {without_credentials(argument)} holds a user, a password or a token, and Ray shows a job's "
                "command on its dashboard; put it into the environment of the nodes, or into a file that --config names"
            )
    uri = default_tracking_uri()
    if without_credentials(uri) != uri:
        on_line(
            f"MLflow at {without_credentials(uri)}: its credentials stay here, as Ray shows a job's variables on its "
            "dashboard; the job uses the MLFLOW_TRACKING_URI of its node"
        )
    own = own_files(criteria_in(args))
    words = absolute(args) if needs.working_dir is None else shipped(absolute(args), needs.working_dir.absolute())
    entrypoint = ["python", "-m", "espalier", *words]
    outcome = submit(
        entrypoint, address=address, env=job_environment(), on_line=on_line, follow=follow, own=own, needs=needs
    )
    return outcome.exit_code or 0


def job_needs(
    working_dir: Path | None, runtime_env: Path | None, cpus: float | None, gpus: float | None, memory: str | None
) -> JobNeeds:
    """What --working-dir, --runtime-env and --entrypoint-… ask for; `memory` is a size such as 8GB. Raises Refusal."""
    for name, amount in (("cpus", cpus), ("gpus", gpus)):
        if amount is not None and amount < 0:
            raise Refusal(f"--entrypoint-{name} {amount:g}: must be 0 or more")
    try:
        size = None if memory is None else int(TypeAdapter(ByteSize).validate_python(memory))
    except ValidationError:
        raise Refusal(f"--entrypoint-memory {memory}: no size; write it as 8GB or 512MiB") from None
    fields = {} if runtime_env is None else checked_runtime_env(read_yaml(runtime_env), str(runtime_env))
    return JobNeeds(working_dir, fields, cpus, gpus, size)


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


def shipped(args: list[str], working_dir: Path) -> list[str]:
    """`args` (`absolute`) with what exists within `working_dir` named within the job's copy of it, but for what the
    command writes: the copy goes with the job."""
    done = args[:1]
    for before, argument in itertools.pairwise(args):
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        within = os.path.exists(value) and Path(value).is_relative_to(working_dir)
        if within and (option or before) not in WRITTEN:
            value = SHIPPED + value.removeprefix(str(working_dir))
        done.append(f"{option}{equals}{value}")
    return done


def job_environment() -> dict[str, str]:
    """The variables that say where a run logs and downloads, as they are here, with MLflow's default filled in.

    Secrets stay here, and so do URIs that hold some, because Ray shows a job's variables on its dashboard and in the
    process list: set those on the nodes.
    """
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON) and not is_secret(name)}
    passed.setdefault("MLFLOW_TRACKING_URI", default_tracking_uri())
    return {name: value for name, value in passed.items() if without_credentials(value) == value}


def _absolute(value: str, option: str) -> str:
    if "://" in value or value.startswith("-"):
        return value
    is_path = option in WRITTEN or (os.path.exists(value) and (option in ("", *READ, *FLAGS) or os.sep in value))
    return os.path.abspath(value) if is_path else value
