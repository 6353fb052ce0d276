"""`python -m leankv`: the command line, without the installed script."""

from leankv.cli import main

main()
