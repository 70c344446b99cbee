"""The script `polygrad-fast`, and `python -m polygrad_fast`."""

import signal
import sys

from polygrad_fast.runs.interrupts import end_on_interrupt


def main() -> int:
    """Run the command line and leave the process to end."""
    with end_on_interrupt():
        from polygrad_fast import cli
    try:
        return cli.main()
    finally:
        # what torch does at exit takes a while: another Ctrl-C meanwhile ends the process silently
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
