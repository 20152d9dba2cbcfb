"""`python -m wanloom`: the same as the `wanloom` command."""

import sys

from wanloom.signals import ended_by_ctrl_c


def run() -> int:
    """The command, which Ctrl-C ends without a traceback from its first imports on."""
    with ended_by_ctrl_c():
        from wanloom.cli import main

        return main()


if __name__ == "__main__":
    sys.exit(run())
