"""`python -m dynmoe.tta`: methods of test-time adaptation on streams of shifted images.

The command is in `dynmoe.experiments.tta.command`.
"""

from __future__ import annotations

from dynmoe.commands import begin, run_command

begin("tta", __name__)  # before imports that may fail

from dynmoe.experiments.tta.command import Config, experiment, main, presets, run  # noqa: E402

__all__ = ["Config", "experiment", "main", "presets", "run"]

if __name__ == "__main__":
    run_command(main)
