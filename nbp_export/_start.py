"""Starts a command as a process of its own. It imports nothing that takes time, so that Ctrl-C is handled at once."""

import signal
import sys
from importlib import import_module


def start(module: str, name: str) -> None:
    """Run the click command `main` of a module. Ctrl-C ends it in one line, even while its libraries are imported."""
    try:
        import_module(module).main(prog_name=name)
    except KeyboardInterrupt:
        if sys.stderr:
            sys.stderr.write("\nAborted!\n")
        sys.exit(128 + signal.SIGINT)
    finally:
        # The work is done or undone by now. Another Ctrl-C would only interrupt the interpreter's own clean-up.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
