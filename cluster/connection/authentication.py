"""Ray's shared token: where it is found, and an environment that Ray really reads.

Ray 2.60 keeps its own copy of RAY_AUTH_MODE and of the token from the moment it is imported, and some of its clients
start with authentication off and then hang (about 22 s) on a cluster that asks for a token. So: every change of the
environment goes through `ray_environment`, which makes Ray read it again, and every client here is told
RAY_AUTH_MODE=token as soon as a token exists.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from espalier.cluster.connection.watchdog import TOKEN_FILE
from espalier.stages.errors import Refusal

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
DEFAULT_TOKEN_PATH = Path("~/.ray/auth_token")
REMEDY = f"set {TOKEN_PATH} to a file with the cluster's token (`ray get-auth-token` prints it on the head node)"


@dataclass(frozen=True)
class Credentials:
    """The token to send, None without one, and where it came from, or why there is none."""

    token: str | None
    source: str

    def __repr__(self) -> str:  # the token stays out of logs and tracebacks
        return f"Credentials({'a token' if self.token else 'no token'}, {self.source})"

    @property
    def environment(self) -> dict[str, str | None]:
        """What Ray must see to use them; with RAY_AUTH_MODE unset it would try without a token."""
        return {MODE: "token" if self.token else "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

    def refused_by(self, what: str) -> Refusal:
        """The refusal for a server that wants a token and was sent none, or was sent another than its own."""
        if self.token:
            return Refusal(f"{what} does not accept the token from {self.source}; {REMEDY}")
        return Refusal(f"{what} asks for a token, and there is none here ({self.source}); {REMEDY}")


def find_credentials() -> Credentials:
    """Those Ray would use: RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH names, else ~/.ray/auth_token, else none.

    Raises Refusal for a named file that cannot be read or is empty: Ray itself ends the process there.
    """
    mode = os.environ.get(MODE, "token")
    if mode.lower() != "token":
        return Credentials(None, f"{MODE}={mode} forbids it: unset it")
    if given := os.environ.get(TOKEN, "").strip():
        return Credentials(given, TOKEN)
    named = os.environ.get(TOKEN_PATH)
    path = Path(named) if named else DEFAULT_TOKEN_PATH.expanduser()
    if not named and not path.exists():
        making = "`ray get-auth-token --generate` makes one before a cluster is started"
        return Credentials(None, f"looked at {TOKEN}, {TOKEN_PATH} and {DEFAULT_TOKEN_PATH}; {making}")
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise Refusal(f"Ray token file {path}: {error.strerror}; {REMEDY}") from error
    if not token:
        raise Refusal(f"Ray token file {path} is empty; {REMEDY}")
    return Credentials(token, str(path))


def new_token_file(directory: Path) -> Path:
    """A file in `directory` with a fresh 256-bit token, readable by its owner alone."""
    path = directory / TOKEN_FILE
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


@contextlib.contextmanager
def ray_environment(settings: dict[str, str | None]) -> Iterator[None]:
    """Holds os.environ with `settings` for the block (None removes a name), for this process, Ray and its children."""
    before = {name: os.environ.get(name) for name in settings}
    _set(settings)
    _make_ray_read_it()
    try:
        yield
    finally:
        _set(before)
        _make_ray_read_it()


def _set(settings: dict[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _make_ray_read_it() -> None:
    """Drops what Ray has cached of the environment. The configuration first: with the mode still `token`, a thread of
    Ray that reloads a token which is gone ends the process."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
