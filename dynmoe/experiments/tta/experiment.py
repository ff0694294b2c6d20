"""All runs of a comparison: every method, stream and seed, and what they add up to."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cl_benchmarks.shifts.embedded import Embedded
from cl_benchmarks.shifts.imagenet import SIZE, Imagenet, subset
from cl_benchmarks.shifts.stream import STREAMS, ShiftSource, Stream, make_stream
from dynmoe.errors import UserError, unknown
from dynmoe.experiments.tta.report import report
from dynmoe.experiments.tta.settings import Config
from dynmoe.experiments.tta.source_model import embedded_model, keep_classes, normalise, timm_model
from dynmoe.experiments.tta.trial import make_adapter, open_run, run_method, safe, shifted
from dynmoe.experiments.tta.variants import parse_variant
from dynmoe.lab.config import from_dict, identity, to_dict
from dynmoe.lab.device import make_deterministic, resolve
from dynmoe.lab.jobs import Job, run_jobs
from dynmoe.lab.results import Result, read_run
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.alignment import alignment
from dynmoe.tta.options import for_classes

LEAST = {"seeds": 1, "jobs": 1, "batch_size": 1, "window": 1, "lr_scale": 0.0, "threads": 0,
         "routing_batches": 0, "alignment": 0}  # fmt: skip
"""Setting -> the smallest value that can work. Methods check their own options."""

Trials = dict[str, dict[str, list[Config]]]
"""method's label -> stream -> settings of one run each, one per seed"""


def run_all(preset: str, config: Config) -> Result:
    """Run every method on every stream with every seed; then results.json, tables and figures.

    Raises:
        UserError: settings, data or methods that cannot work, told before any run begins.
    """
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    source, model = make_source(config)
    methods = variants(config, source.num_classes)
    streams = [shifted(replace(config, streams=(name,)), source) for name in config.streams]
    for one in methods.values():  # what cannot work shows now, and the cache is filled
        _check_batches(make_adapter(one, copy.deepcopy(model)), config, streams)
    trials = _trials(config, methods)
    jobs = {label: {stream: [job_of(preset, label, one) for one in own]
                    for stream, own in streams.items()}
            for label, streams in trials.items()}  # fmt: skip
    flat = [job for streams in jobs.values() for own in streams.values() for job in own]
    settings = [one for streams in trials.values() for own in streams.values() for one in own]
    alone = config.jobs == 1 or len(flat) == 1
    for one, job in zip(settings, flat, strict=True):
        if alone or job.done:  # a finished run is opened too, to see that its settings are ours
            run_method(preset, one, source, copy.deepcopy(model))
    run_jobs(flat, config.jobs, "tta")
    cosines = None
    if config.alignment and len(STREAMS[config.streams[-1]]) > 1:
        cosines = domain_alignment(config, source, copy.deepcopy(model))
    summaries = {label: {stream: [job.summary() for job in own] for stream, own in streams.items()}
                 for label, streams in jobs.items()}  # fmt: skip
    folder = Path(config.runs_dir) / "tta" / (config.name or preset)
    report(folder, source.name, config, summaries, cosines)
    own = [job for one in jobs[config.method.part.name].values() for job in one]
    first = [*own, *(job for job in flat if job not in own)]
    return Result(folder, tuple(read_run(job.folder) for job in first))


def main(argv: list[str]) -> None:
    """One run in a process of its own: argv is the preset and the settings as JSON."""
    preset, settings = argv
    config = from_dict(Config, json.loads(settings))
    run_method(preset, config, *make_source(config))


def _check_batches(adapter: Adapter, config: Config, streams: list[Stream]) -> None:
    """Refuse batches of one image, be it the last of a stream, where the method needs two."""
    for name, stream in zip(config.streams, streams, strict=True):
        if adapter.by_batch and stream.smallest_batch == 1:
            raise UserError(
                f"{adapter.name} with this model normalises by the batch, which needs at least 2 "
                f"images, and a batch of the stream {name} has 1; use another --batch-size (now "
                f"{config.batch_size}) or --limit, or a model without BatchNorm"
            )


def _trials(config: Config, methods: dict[str, Config]) -> Trials:
    """The settings of all runs. Each goes on from where it was stopped, which is never wrong."""
    seeds = range(config.seed, config.seed + config.seeds)

    def trial(label: str, one: Config, stream: str, seed: int) -> Config:
        name = f"{config.name}-{safe(label)}-{safe(stream)}" if config.name else None
        return replace(one, streams=(stream,), seed=seed, name=name, resume=True)

    return {label: {stream: [trial(label, one, stream, seed) for seed in seeds]
                    for stream in config.streams}
            for label, one in methods.items()}  # fmt: skip


def job_of(preset: str, label: str, config: Config) -> Job:
    """The run of these settings: one method, one stream, one seed."""
    argv = (preset, json.dumps(to_dict(config)))
    title = f"{label}, {config.streams[0]}, seed {config.seed}"
    return Job(
        title, "experiments.tta.experiment", argv, open_run(preset, config).folder, identity(config)
    )


def variants(config: Config, classes: int) -> dict[str, Config]:
    """Label in tables -> settings: those compared with, then the method itself.

    Raises:
        UserError: a variant that cannot be read, or is named twice.
    """
    own = config.method.part.name
    default = config.compare == Config.compare
    texts = [text for text in config.compare if not (default and text == own)]
    if len(set(texts)) < len(texts) or own in texts:
        raise UserError(f"--compare {' '.join(texts)}: a method is named twice ({own} runs anyway)")
    methods = {text: parse_variant(text, classes) for text in texts}
    methods[own] = fitted(config, classes).method
    return {label: replace(config, method=method) for label, method in methods.items()}


def fitted(config: Config, classes: int) -> Config:
    """The settings with the method's options that follow the number of classes."""
    return replace(config, method=for_classes(config.method, classes))


def make_source(config: Config) -> tuple[ShiftSource, nn.Module]:
    """The images and the trained model, on the CPU."""
    if config.data == "embedded":
        if config.labels != "all-1000" or config.on_the_fly:
            raise UserError("--labels and --on-the-fly are options of --data imagenet")
        data = Embedded(config.embedded)
        return data, embedded_model(data, config.vit, config.threads)
    Imagenet(config.data_dir)  # a wrong folder shows before a model is fetched
    kept = None
    if config.labels == "subset":
        if len(config.streams) != 1:
            raise UserError("--labels subset needs one stream: rendition or adversarial")
        kept = subset(config.streams[0])
    model, how = timm_model(config.model, config.pretrained, config.weights, 1000)
    if how["input_size"][-1] != SIZE:
        raise UserError(
            f"model {config.model!r} takes images of {how['input_size'][-1]} pixels, and the "
            f"streams have {SIZE}; use a model for {SIZE}"
        )
    if kept is not None:
        keep_classes(model, kept)
    mean, std = tuple(how["mean"]), tuple(how["std"])
    return Imagenet(config.data_dir, config.labels, config.on_the_fly, mean, std), model


def domain_alignment(
    config: Config, source: ShiftSource, model: nn.Module
) -> dict[str, dict[str, float]]:
    """Cosines between the gradients of the last stream's domains at the trained model, by name."""
    device, size = resolve(config.device), config.batch_size
    make_deterministic(device)
    model = model.to(device)
    stream = make_stream(source, config.streams[-1], "sequential", config.severity, size,
                         config.seed, config.alignment * size)  # fmt: skip
    ends = list(itertools.accumulate(-(-len(s.indices) // size) for s in stream.segments))

    def batches(first: int, end: int) -> Iterator[Tensor]:
        for number in range(first, end):
            images = stream.batch(number).images.to(device)
            yield normalise(images, source.mean, source.std)

    pairs = zip(stream.names, [0, *ends], ends, strict=False)
    cosines = alignment(model, {name: batches(first, end) for name, first, end in pairs}).tolist()
    return {name: dict(zip(stream.names, row, strict=True))
            for name, row in zip(stream.names, cosines, strict=True)}  # fmt: skip


def check(config: Config) -> None:
    """Refuse settings that cannot work before any work is done.

    Raises:
        UserError: names the flag.
    """
    for name, least in LEAST.items():
        value = getattr(config, name)
        if not value >= least:  # also refuses nan
            raise UserError(f"--{name.replace('_', '-')} {value} is too small; use {least} or more")
    for stream in config.streams:
        if stream not in STREAMS:
            raise unknown("stream", stream, STREAMS)
    if not config.streams or len(set(config.streams)) < len(config.streams):
        raise UserError("--streams needs one or more streams, each named once")
    if config.data == "embedded" and "validation" in config.streams:
        raise UserError("the stream validation needs --data imagenet: its corruptions have no "
                        "32-pixel version")  # fmt: skip
