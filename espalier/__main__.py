"""The process of a command, `espalier ...` or `python -m espalier`: it can be told to stop before the command itself is
imported."""

import os
import sys

from espalier.pipeline.run.stopping import exit_code, raising_on_signals


def main() -> int:
    """Run the command line of this process; its exit code. One that was interrupted does not come back.

    Python takes seconds to take itself apart after all that a run imports, and hears nothing meanwhile.
    """
    try:
        with raising_on_signals():
            from espalier.pipeline.cli.main import main as run

            code = run()
    except KeyboardInterrupt:
        sys.stderr.write("espalier: interrupted\n")
        code = exit_code()
    if code > 128:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
