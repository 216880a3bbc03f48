"""What must not be shown: passwords and tokens within URIs, and the values of variables that hold secrets.

The run itself keeps the whole URI in memory. What is printed, stored or sent to a tracker goes through here first.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
SHORTEST_SECRET = 8  # characters; replacing every "1" in a message because some TOKEN is 1 would hide nothing
SECRET_WORDS = {"TOKEN", "PASSWORD", "PASSWD", "PASS", "KEY", "SECRET", "AUTH", "CREDENTIAL", "CREDENTIALS"}
PLACES = {
    "PATH",
    "FILE",
    "DIR",
    "MODE",
    "SOCK",
}  # HF_TOKEN_PATH says where a token is, and RAY_AUTH_MODE what to do with it
WEB = r"(?:https?|s3[an]?|gs|gcs|abfss?|wasbs?|ftps?|sftp|ssh|hdfs)"
# Of the web an authority ends at the first slash; SQLAlchemy takes a password with slashes in it, up to the @.
USERINFO = re.compile(
    rf"""(?P<web>\b{WEB}://)[^/\s?#'"]*@"""
    r"""|(?P<other>\b[a-z][a-z0-9+.-]*://)(?:[^:/\s@'"]*:(?!\d+(?:[/?\s]|$))[^\s@]*|[^:/\s@'"]*)@(?=[^\s@]*)""",
    re.IGNORECASE,
)
SECRET_QUERY = re.compile(
    r"""(?P<name>[?&;](?:[^=&;\s'"]*(?:token|passw|pwd|secret|key|sig|credential|auth)[^=&;\s'"]*|odbc_connect)=)"""
    r"""[^&;\s'"#)]+""",
    re.IGNORECASE,
)
PASSWORD = re.compile(r"://[^:/\s@]*:([^@\s]+)@")
BEARER = re.compile(r"""\b(?P<scheme>Bearer|Basic)\s+[\w.~+/=-]{8,}""")


def without_credentials(text: str) -> str:
    """`text`, a URI or a sentence with some in it, without users, passwords, and tokens in queries."""
    if "://" not in text:
        return text
    bare = USERINFO.sub(lambda found: found["web"] or found["other"], text)
    return SECRET_QUERY.sub(rf"\g<name>{HIDDEN}", bare)


def without_secrets(text: str) -> str:
    """A message as it may be shown: `without_credentials`, no Bearer token, no secret of this process's environment."""
    text = without_credentials(text)
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return BEARER.sub(rf"\g<scheme> {HIDDEN}", text)


def storable(value: Any) -> Any:
    """`value`, of mappings, lists and plain values, with every string in it `without_credentials`."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, Mapping):
        return {name: storable(item) for name, item in value.items()}
    return [storable(item) for item in value] if isinstance(value, list | tuple) else value


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret: HF_TOKEN does, HF_TOKEN_PATH does not."""
    words = name.upper().split("_")
    return words[-1] not in PLACES and not SECRET_WORDS.isdisjoint(words)


def _secrets() -> Iterator[str]:
    """The values of variables that hold secrets, and the passwords in those that hold URIs."""
    for name, value in os.environ.items():
        held = [value.strip()] if is_secret(name) else PASSWORD.findall(value)
        for secret in held:
            yield from (form for form in {secret, unquote(secret)} if len(form) >= SHORTEST_SECRET)
