"""`python -m planner`."""

from planner.cli.commands import main

main()
