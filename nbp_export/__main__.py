"""Runs the command `nbp-export` as `python -m nbp_export`."""

import signal
import sys


def start() -> None:
    """Run the command as a process of its own: Ctrl-C ends it in one line, even while its libraries are imported."""
    try:
        from nbp_export.cli import main

        main(prog_name="nbp-export")
    except KeyboardInterrupt:
        if sys.stderr:
            sys.stderr.write("\nAborted!\n")
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was asked is done or undone: nothing is left to stop


if __name__ == "__main__":
    start()
