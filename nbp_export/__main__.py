"""Runs the command `nbp-export` as `python -m nbp_export`."""

from nbp_export.cli import main

main(prog_name="nbp-export")
