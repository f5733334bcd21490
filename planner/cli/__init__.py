"""The shell: `planner …`, a command a file; commands.py joins them."""
