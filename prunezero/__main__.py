"""`python -m prunezero` is `prunezero`."""

from prunezero.cli import main

main()
