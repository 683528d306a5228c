"""Runs the command `nbp-export` as `python -m nbp_export`, and is the entry point of the installed command."""

from nbp_export._start import start


def main() -> None:
    """Run `nbp-export`."""
    start("nbp_export.cli", "nbp-export")


if __name__ == "__main__":
    main()
