"""`python -m graft` is the command `graft`."""

from graft.cli.main import main

main()
