"""What is raised on purpose: what the user can mend, and what a run goes on from; and how both are said in one line."""

from collections.abc import Iterable
from difflib import get_close_matches

MOST_LISTED = 20


class Refusal(ValueError):
    """What was asked cannot be done, and why: one line naming the thing, its value, the rule and the remedy.

    The command line prints it without a traceback and exits with code 2; everything else that is raised is a bug.
    """


class OutOfStep(RuntimeError):
    """A shard was asked for something whose forerunner it has not seen, as after a restart: stream to it again."""


class DeviceLost(RuntimeError):
    """Whatever this process asks of its device fails from now on (see `espalier.stages.device_errors`): another has to
    go on."""


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, which may go on for twenty; its type's name where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def nearest(name: str, known: Iterable[str], at_most: int = 1, cutoff: float = 0.5) -> list[str]:
    """Those of the known names that are most like `name`, the nearest first; `cutoff` 1 is the same, 0 anything."""
    return get_close_matches(name, list(known), n=at_most, cutoff=cutoff)


def unknown(name: str, known: Iterable[str], listed: str = "there are") -> str:
    """`is unknown; did you mean wanda? there are: …`, for a Refusal to say of a name that is none of the known; of more
    than MOST_LISTED the list is left out where one is near."""
    known = list(known)
    near = nearest(str(name), known)
    hint = f" did you mean {near[0]}?" if near else ""
    shown = "" if near and len(known) > MOST_LISTED else f" {listed}: {', '.join(known) or 'none'}"
    return f"is unknown;{hint}{shown}"
