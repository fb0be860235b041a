"""`python -m gguforge.cli` is the `gguforge` command."""

from gguforge.cli.main import main

main()
