"""Runs of `dynmoe.rl`: the mean return of an agent's last episodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.lab.jobs import Job
from dynmoe.lab.statistics import confidence_interval
from dynmoe.studies.views.drawing import band, new_figure, save
from dynmoe.studies.views.view import At, View, named_jobs, three

if TYPE_CHECKING:
    from dynmoe.studies.design import Results


class Returns(View):
    """Reinforcement learning. The metric is `final_return`, in the game's points."""

    metric = "final_return"
    columns = (("final return", "final_return", "last"),)
    references = ("dense",)

    def jobs(self, argv: list[str], seeds: list[int], runs_dir: Path, label: str) -> list[Job]:
        """Runs in `runs_dir/rl/studies`."""
        from dynmoe.rl import presets

        return named_jobs("rl", presets(), argv, seeds, runs_dir, label)

    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        """A number of the summary; there are no tasks."""
        return float(summary[metric])

    def unit(self, metric: str) -> tuple[float, str, int]:
        """Returns are no shares."""
        return 1.0, "", 2

    def entry(self, results: Results, stream: str, variant: str) -> dict[str, Any]:
        """Every seed's return and learning curve, and intervals."""
        runs, returns = results.runs[stream][variant], results.values(stream, variant)
        return {
            "final_return": returns,
            "final_return_mean": three(confidence_interval(returns, "mean")),
            "final_return_iqm": three(confidence_interval(returns, "iqm")),
            "parameters": runs[0]["parameters"],
            "curves": [run["curve"] for run in runs],
        }

    def draw(self, path: Path, results: Results, title: str) -> None:
        """A panel per stream: mean episodic return over the environment steps."""
        figure = new_figure(title, 4.2)
        grid = figure.subplots(1, len(results.streams), squeeze=False)
        for stream, axes in zip(results.streams, grid[0], strict=True):
            for number, (variant, runs) in enumerate(results.runs[stream].items()):
                steps = [step for step, _ in runs[0]["curve"]]
                points = zip(*([value for _, value in r["curve"]] for r in runs), strict=True)
                whole = [(s, p) for s, p in zip(steps, points, strict=True) if None not in p]
                intervals = [confidence_interval(list(p), "mean") for _, p in whole]
                band(axes, [s for s, _ in whole], intervals, number, variant, 1)
            axes.set(title=stream, xlabel="environment steps", ylabel="episodic return")
        save(figure, path)
