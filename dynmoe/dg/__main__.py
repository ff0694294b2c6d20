"""`python -m dynmoe.dg`: domain generalisation, leaving one domain out at a time.

The command is in `dynmoe.experiments.dg.command`.
"""

from __future__ import annotations

from dynmoe.commands import begin, run_command

begin("dg", __name__)  # before imports that may fail

from dynmoe.experiments.dg.command import Config, experiment, main, presets, run  # noqa: E402

__all__ = ["Config", "experiment", "main", "presets", "run"]

if __name__ == "__main__":
    run_command(main)
