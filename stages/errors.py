"""The one exception that is the user's to mend."""


class Refusal(ValueError):
    """What was asked cannot be done, and why: one line naming the thing, its value, the rule and the remedy.

    The command line prints it without a traceback and exits with code 2; everything else that is raised is a bug.
    """


class OutOfStep(RuntimeError):
    """A shard was asked for something whose forerunner it has not seen, as after a restart: stream to it again."""


class DeviceLost(RuntimeError):
    """Whatever this process asks of its device fails from now on (see `espalier.stages.device_errors`): another has to
    go on."""
