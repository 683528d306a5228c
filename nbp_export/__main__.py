"""`python -m nbp_export`, which is the command `nbp-export`."""

from nbp_export.cli import main

main(prog_name="nbp-export")
