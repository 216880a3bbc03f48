"""What is raised on purpose: what the user can mend, and what a run goes on from; and an error in one line."""


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
