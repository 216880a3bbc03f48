"""How long something may take, for tests of refusals that must not be waited for."""

import contextlib
import time
from collections.abc import Iterator


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Within it, less than so many seconds go by."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds
