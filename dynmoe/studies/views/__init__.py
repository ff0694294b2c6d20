"""How studies run each command, and read, tabulate and draw its runs: one file per command."""
