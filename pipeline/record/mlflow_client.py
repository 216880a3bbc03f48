"""MLflow's client as Espalier uses it: quiet, quick to give up, and safe for two processes that start at once.

MLflow takes about 3 s to import, so it is imported where it is used.
"""

import logging
import os
import re
import shlex
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.cluster.connection.redact import without_credentials, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Set only where the user has not: short requests and no retries inside MLflow, for the retries are made here, in order.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to --json
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
}
KEY_LENGTH = 250  # MLflow's limit


def key_of(name: str) -> str:
    """A name as MLflow takes it for a parameter, a tag or a metric."""
    return re.sub(r"[^\w\-. :/]", "_", str(name))[:KEY_LENGTH]


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or else a sqlite database in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(Path.cwd() / "mlflow.db")


def _sqlite_uri(database: Path) -> str:
    """The URI of a database file; from here where its folder's name holds what a URI gives a meaning.

    SQLAlchemy ends a path at a question mark, and from 2.1 on (not before) reads %20 as a space: no spelling of such an
    absolute path serves both.
    """
    return f"sqlite:///{os.path.relpath(database) if set('?%') & set(str(database)) else database}"


def sqlite_path(tracking_uri: str) -> Path | None:
    """The database file behind a sqlite URI (absolute), or None for any other URI."""
    match = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", tracking_uri)
    return Path(match[1]).absolute() if match else None


def ui_command(tracking_uri: str) -> str:
    """What to type to look at the runs kept at `tracking_uri`, a URI that may have lost its credentials in a record."""
    given, tracking_uri = default_tracking_uri(), without_credentials(tracking_uri)
    if tracking_uri.startswith(("http://", "https://")):
        return f"python -m webbrowser {tracking_uri}"
    database = sqlite_path(tracking_uri)
    if database is not None and database.parent == Path.cwd():
        tracking_uri = f"sqlite:///{database.name}"
    if without_credentials(given) == tracking_uri != given:  # the shell knows them
        return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)}"


def open_client(tracking_uri: str) -> "MlflowClient":
    """An MLflow client for this URI. A request that gets no answer fails after seconds; a new database is made."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails also raises, and is told in one line
    warnings.filterwarnings("ignore", module="alembic")
    database = sqlite_path(tracking_uri)
    if database is not None and not database.exists():
        _create_database(database)
    return MlflowClient(tracking_uri=tracking_uri)


def client_errors() -> tuple[type[Exception], ...]:
    """What a client raises when it cannot do its work: MLflow's own errors, its database's, and (as OSError) HTTP's."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


def _create_database(path: Path) -> None:
    """Make MLflow's tables in a file of our own, then link it under its name: of two processes that do so, one wins.

    Two processes in MLflow's own migrations of one file break each other, and can leave it half made.
    """
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        MlflowClient(tracking_uri=_sqlite_uri(building)).search_experiments(max_results=1)
        try:
            os.link(building, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)


def existing_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run to continue, or None where this server does not have it (any more); then a new run takes its place."""
    try:
        run = client.get_run(run_id)
    except Exception as fault:
        if is_final(fault):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def experiment_id(client: "MlflowClient", name: str, tracking_uri: str) -> str:
    """The id of the experiment, made if need be; artifacts of a sqlite database lie beside it, in `mlartifacts`."""
    found = client.get_experiment_by_name(name)
    if found is None:
        database = sqlite_path(tracking_uri)
        location = (database.parent / "mlartifacts").as_uri() if database is not None else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception:
            found = client.get_experiment_by_name(name)  # made by another process in between
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise RuntimeError(
            f"experiment {name!r} is deleted; to bring it back: "
            f"mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return str(found.experiment_id)


def is_final(fault: Exception) -> bool:
    """Whether asking again cannot help: the server understood and said no, or a file to send is not there."""
    if isinstance(fault, (FileNotFoundError, PermissionError)):
        return True
    code = getattr(fault, "get_http_status_code", lambda: 500)()
    return 400 <= code < 500 and code not in (408, 429)


def reason(fault: Exception) -> str:
    """Why, in a few words: MLflow's messages hold the library's message, which holds the socket's."""
    text = without_secrets(fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault))
    for sign, words in (
        ("Connection refused", "connection refused"),
        ("Name or service not known", "unknown host"),
        ("Failed to resolve", "unknown host"),
        ("imed out", "no answer in time"),
        ("database is locked", "database is locked"),
    ):
        if sign in text:
            return words
    first = text.strip().splitlines()[0] if text.strip() else type(fault).__name__
    return first if len(first) <= 160 else first[:157] + "..."
