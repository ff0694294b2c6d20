"""Domain generalisation: methods with each domain left out in turn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.experiments.dg.batch import check_batches
from dynmoe.experiments.dg.exporting import DomainExporter
from dynmoe.experiments.dg.measure import beside_figure, method_figures
from dynmoe.experiments.dg.selection import selected
from dynmoe.experiments.dg.settings import Config
from dynmoe.experiments.dg.source import Source, load_source
from dynmoe.experiments.dg.trial import Trial
from dynmoe.lab import inputs
from dynmoe.lab.cache import Arrays
from dynmoe.lab.config import RunConfig
from dynmoe.lab.experiment import At, Curve, Details, Experiment, Results
from dynmoe.lab.export import Exporter
from dynmoe.lab.figures import chance_line, dots, looks, new_figure, save
from dynmoe.lab.report import print_table
from dynmoe.lab.run import Run
from dynmoe.lab.statistics import three

BESIDE = ("moe2", "erm")
"""Methods whose features are shown side by side where both run, as in Figure 3 of MoE²."""
ENOUGH = 10
"""Images of a domain that are worth such a figure."""
CALIBRATION = ("ece", "adaptive_ece")
"""Metrics of how far confidence and accuracy are apart; runs from before have none."""


@dataclass(frozen=True)
class DomainGeneralisation(Experiment):
    """What `dynmoe.dg` does: one run is one method in one trial, every domain left out in turn.

    Metrics, as means over the left-out domains: `accuracy`, at the selected evaluation;
    `oracle_accuracy`, at the last one; `source_accuracy`, on the sources' held-out images at the
    selected one; `selection_accuracy`, by which it was selected, and by which a search chooses
    settings, as in DomainBed; `ece` and `adaptive_ece`, at the selected one;
    `trainable`, the trainable parameters; and the method's own `measures`, of MoE² those of
    `dynmoe.dg.methods.moe2.departure`.
    """

    command = "dg"
    on_processes = True
    least: ClassVar[dict[str, float]] = {
        "steps": 1, "eval_every": 1, "batch_size": 1, "eval_batch": 1, "lr": 0, "weight_decay": 0,
        "granularity": 0, "features": 0, "landscape": 0,
    }  # fmt: skip
    metric = "accuracy"
    search_metric = "selection_accuracy"
    columns = (
        ("accuracy", "accuracy", "mean"),
        ("last step", "oracle_accuracy", "mean"),
        ("ECE", "ece", "mean"),
        ("ECE, ad.", "adaptive_ece", "mean"),
        ("trainable", "trainable", "mean"),
    )
    lesser = ("last step", "ECE", "ECE, ad.")
    legend = "ECE, ad.: with adaptive bins"
    references = ("linear-probe", "moa")
    at = "mean"
    about = ("domains", "test_domains", "model")

    def check(self, config: Config) -> None:
        """Also what is compared, and that a grid has sides."""
        super().check(config)
        if config.landscape == 1:
            raise UserError("--landscape 1 is too small; use 0, or at least 2")
        for name in config.compare:
            registry.get("dg", name)
            if config.compare.count(name) > 1:
                raise UserError(f"--compare names {name} twice; name each once")

    def variants(self, config: Config, shared: Source) -> dict[str, dict[str, Config]]:
        """The method of the settings, and each of `config.compare` with its defaults, not grown.

        Raises:
            UserError: one that cannot learn from the batches of the data.
        """
        own = config.method.part.name
        found = {own: replace(config, resume=True)}
        for name in config.compare:
            if name != own:
                found[name] = replace(
                    config,
                    method=registry.get("dg", name).Config(),
                    granularity=0,
                    name=f"{config.name}-{name}" if config.name else None,
                    resume=True,
                )
        check_batches(found, own, len(shared.data.domains))
        return {"": found}

    def label(self, config: Config, shared: Source) -> str:
        """Method and data set."""
        return f"{config.method.part.name}-{config.domains.part.name}"

    def load(self, config: Config) -> Source:
        """Domains and backbone."""
        return load_source(config)

    def inputs(self, config: Config, shared: Source) -> dict[str, str]:
        """Weights and images, where they are files."""
        folder = getattr(config.domains, "data_dir", None)
        images = inputs.images(shared.data.name, folder, shared.data.files)
        return images | inputs.weights(config.weights)

    def prepare(self, run: Run, config: Config, shared: Source) -> Trial:
        """The trial of the settings' seed."""
        return Trial(run, config, shared)

    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        """Mean over the left-out domains; nan for a figure that was not measured."""
        if metric == self.search_metric:
            return selection_accuracy(summary)
        found = [{**row, **row["measures"]}.get(metric) for row in summary["tests"]]
        return sum(math.nan if value is None else float(value) for value in found) / len(found)

    def unit(self, metric: str) -> tuple[float, str, int]:
        """Accuracies in points."""
        return (1.0, "", 0) if metric == "trainable" else super().unit(metric)

    def describe(self, metric: str, at: At) -> str:
        """A mean over domains."""
        return f"{metric.replace('_', ' ')}, mean over left-out domains"

    def details(self, summary: dict[str, Any]) -> Details:
        """Accuracy on left-out domains by step, their mean; growths of all; sizes."""
        tests = summary["tests"]
        steps = [row["step"] for row in tests[0]["curve"]]
        by_test = [[row["out"][test["domain"]] for row in test["curve"]] for test in tests]
        means = [float(np.mean(values)) for values in zip(*by_test, strict=True)]
        return Details(
            {"accuracy_on_left-out_domains": Curve("step", list(zip(steps, means, strict=True)))},
            growths=[event for test in tests for event in test["growth"]],
            cost={name: tests[-1][name] for name in ("parameters", "trainable")},
        )

    def entry(self, results: Results, stream: str, variant: str) -> dict[str, Any]:
        """Every seed's accuracy by left-out domain, the method's own figures, and intervals."""
        runs = results.runs[stream][variant]
        rows = [row for run in runs for row in run["tests"]]
        entry: dict[str, Any] = {
            "trainable": rows[0]["trainable"],
            "parameters": rows[0]["parameters"],
            "domains": by_domain(runs),
            "measures": {n: float(np.mean([row["measures"][n] for row in rows]))
                         for n in rows[0].get("measures", {})},
            "growths": [sum(len(row["growth"]) for row in run["tests"]) for run in runs],
        }  # fmt: skip
        for metric in ("accuracy", "oracle_accuracy", *CALIBRATION):
            entry[metric] = three(results.interval(stream, variant, metric))
        return entry

    def summaries(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Accuracy on each left-out domain, one summary a seed."""
        own = {"trainable": entry["trainable"], "measures": {}}
        by_seed = zip(*entry["domains"].values(), strict=True)
        return [{"tests": [{"accuracy": a, **own} for a in seed]} for seed in by_seed]

    def draw(self, path: Path, results: Results, title: str) -> None:
        """Per stream: accuracy with its interval by variant, and against the trainable parameters.

        The second is the shape of Figure 1 of MoE².
        """
        figure = new_figure(title, 4.0 * len(results.streams))
        grid = figure.subplots(len(results.streams), 2, squeeze=False)
        for stream, (left, right) in zip(results.streams, grid, strict=True):
            rows = {v: results.interval(stream, v) for v in results.runs[stream]}
            dots(left, rows, 100)
            left.set(title=stream, xlabel="accuracy on left-out domains (%)")
            chance_line(left, results.chance.get(stream), across=True)
            own = looks(rows)
            for variant, interval in rows.items():
                trainable = results.values(stream, variant, "trainable")[0]
                right.plot([trainable], [100 * interval.point], own[variant].mark, label=variant,
                           color=own[variant].color)  # fmt: skip
            right.set(title=stream, xlabel="trainable parameters", xscale="log",
                      ylabel="accuracy on left-out domains (%)")  # fmt: skip
            right.legend(frameon=False, fontsize=8)  # names beside points would overlap
        save(figure, path)

    def exporter(self) -> Exporter:
        """The network of each left-out domain, where the run has kept them."""
        return DomainExporter()

    def chance(self, config: Config, shared: Source) -> float:
        """One in as many as the data have classes."""
        return 1 / len(shared.data.classes)

    def title(self, config: Config, shared: Source) -> str:
        """Data set, backbone, what was done to its input, and selection."""
        return f"{shared.data.name}, {config.model}{shared.about}, {config.selection} selection"

    def report_folder(self, preset: str, config: RunConfig, first: Path) -> Path:
        """Beside the folders of the main method's trials."""
        return first.parent / "report"

    def report_more(self, folder: Path, config: Config, shared: Source, results: Results) -> None:
        """DomainBed's table, the methods' own figures, and what the first trials have kept."""
        (runs,), (folders,) = results.runs.values(), results.folders.values()
        caption = f"test accuracy in %, mean ± standard error over {config.seeds} trial(s)"
        print_table(self.title(config, shared), domain_table(runs), caption)
        for name, own in runs.items():
            last = own[0]["tests"][-1]
            print(f"{name}: {last['trainable']:,} of {last['parameters']:,} parameters are trained")
        kept: dict[str, Arrays] = {}
        for name, own in runs.items():
            measures = self.entry(results, "", name)["measures"]
            if measures:
                own_measures = ", ".join(f"{key} {v:.4f}" for key, v in measures.items())
                print(f"{name}, as docs/dg.md explains: {own_measures}")
            file = folders[name][0] / "figures.npz"
            if file.is_file():
                with np.load(file, allow_pickle=False) as loaded:
                    arrays = {key: loaded[key] for key in loaded.files}
                left_out = own[0]["tests"][0]["domain"]
                method_figures(folder, name, arrays, own[0]["domains"], left_out)
                if name in BESIDE and config.features >= ENOUGH and "features" in arrays:
                    kept[name] = arrays
        if len(kept) > 1:
            beside_figure(folder / "features_beside.png", kept, shared.data.names, left_out)


def selection_accuracy(summary: dict[str, Any]) -> float:
    """By which a run's evaluations were selected, a share; mean over the left-out domains."""
    found = [
        selected(row["curve"], row["domain"], row.get("held_out", {}))[summary["selection"]][0]
        for row in summary["tests"]
    ]
    return sum(found) / len(found)


def by_domain(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Left-out domain -> accuracy (a share) in each trial."""
    names = [row["domain"] for row in runs[0]["tests"]]
    return {n: [run["tests"][i]["accuracy"] for run in runs] for i, n in enumerate(names)}


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over trials, as DomainBed prints them; nan for a single trial.

    The deviation is numpy's default, divided by n and not n - 1, as in DomainBed's tables.
    """
    error = float(np.std(values) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def domain_table(runs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Headings, then a row per method: each left-out domain, and their average.

    Errors of the average are over trials' means: the trials, not their domains, are independent.
    """
    domains = list(by_domain(next(iter(runs.values()))))
    rows = [["method", *domains, "average"]]
    for name, own in runs.items():
        values = by_domain(own)
        means = [float(np.mean(trial)) for trial in zip(*values.values(), strict=True)]
        cells = [_cell(*mean_error(trials)) for trials in (*values.values(), means)]
        rows.append([name, *cells])
    return rows


def _cell(mean: float, error: float) -> str:
    return f"{100 * mean:.1f}" if math.isnan(error) else f"{100 * mean:.1f}±{100 * error:.1f}"
