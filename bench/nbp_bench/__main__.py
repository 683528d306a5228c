"""Runs the command `nbp-bench` as `python -m nbp_bench`, and is the entry point of the installed command."""

from nbp_export._start import start


def main() -> None:
    """Run `nbp-bench`."""
    start("nbp_bench.cli", "nbp-bench")


if __name__ == "__main__":
    main()
