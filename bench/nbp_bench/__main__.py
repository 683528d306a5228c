"""`python -m nbp_bench`, which is the command `nbp-bench`."""

from nbp_bench.cli import main

main(prog_name="nbp-bench")
