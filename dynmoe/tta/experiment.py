"""One comparison of methods of test-time adaptation: every method, stream and seed is a run."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_benchmarks.shifts.embedded import Embedded
from cl_benchmarks.shifts.imagenet import SIZE, Imagenet, subset
from cl_benchmarks.shifts.source import STREAMS, ShiftSource, make_stream
from cl_benchmarks.shifts.stream import Stream
from dynmoe import seeding
from dynmoe.device import resolve
from dynmoe.errors import UserError, unknown
from dynmoe.progress import ProgressLine
from dynmoe.run import Run
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.alignment import alignment
from dynmoe.tta.diagnostics import expert_similarity, use_of_experts
from dynmoe.tta.report import report
from dynmoe.tta.settings import Config
from dynmoe.tta.source_model import embedded_model, keep_classes, normalise, timm_model
from dynmoe.tta.tally import Tally
from dynmoe.tta.variants import few_class_options, for_run, parse_variant

LEAST = {"seeds": 1, "batch_size": 1, "window": 1, "lr_scale": 0.0, "threads": 0,
         "alignment": 0}  # fmt: skip
"""Setting -> the smallest value that can work. Methods check their own options."""


def run_all(preset: str, config: Config) -> None:
    """Run every method on every stream with every seed; then results.json, table and figure."""
    _check(config)
    source, model = make_source(config)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for label, one in variants(config, source.num_classes).items():
        runs[label] = {}
        for stream in config.streams:
            for seed in range(config.seed, config.seed + config.seeds):
                name = f"{config.name}-{_safe(label)}-{_safe(stream)}" if config.name else None
                settings = replace(one, streams=(stream,), seed=seed, name=name)
                summary = run_method(preset, settings, source, copy.deepcopy(model))
                runs[label].setdefault(stream, []).append(summary)
    folder = Path(config.runs_dir) / "tta" / (config.name or preset)
    cosines = None
    if config.alignment and len(STREAMS[config.streams[-1]]) > 1:
        cosines = domain_alignment(config, source, copy.deepcopy(model))
    report(folder, source.name, config, runs, cosines)


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
    fewer = {
        option: value
        for option, value in few_class_options(own, classes).items()
        if getattr(config.method, option) == getattr(type(config.method)(), option)
    }
    methods[own] = replace(config.method, **fewer)
    return {label: replace(config, method=method) for label, method in methods.items()}


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


def run_method(
    preset: str, config: Config, source: ShiftSource, model: nn.Module
) -> dict[str, Any]:
    """Adapt a model along one stream, or read what an earlier run of the same settings found.

    Args:
        preset: part of the run's name.
        config: one stream, one seed.
        source: the images.
        model: the trained model; changed in place.

    Returns:
        the run's summary.
    """
    label = f"{config.method.part.name}-{_safe(config.streams[0])}"
    with Run("tta", preset, config, label=label) as run:
        if run.summary is None:
            run.finish(_adapt(run, config, source, model.to(run.device)))
        assert run.summary is not None
        return run.summary


def _adapt(run: Run, config: Config, source: ShiftSource, model: nn.Module) -> dict[str, Any]:
    """The whole stream, from the start or from the run's checkpoint; returns the summary."""
    stream = make_stream(source, config.streams[0], config.order, config.severity,
                         config.batch_size, config.seed, config.limit)  # fmt: skip
    method = for_run(config.method, config.lr_scale, config.seed, model)
    adapter: Adapter = method.build(model)
    tally, history, start = Tally(stream.names, config.window), [], 0
    if run.restored is not None:
        start, history = run.restored["batch"], run.restored["history"]
        tally.load_state_dict(run.restored["tally"])
        adapter.load_state_dict(run.restored["adapter"])
    elif adapter.source_images:
        adapter.observe_source(_source_batches(config, source, adapter.source_images, run.device))
    with ProgressLine(f"{config.method.part.name}, {config.streams[0]}", len(stream)) as progress:
        progress.start_at(start)
        for number in range(start, len(stream)):
            batch = stream.batch(number)
            images = normalise(batch.images.to(run.device), source.mean, source.std)
            logits = adapter(images)
            if tally.add(logits, batch.labels, batch.domains):
                history.append(_log(run, number + 1, tally, adapter))
            if progress.due(number + 1):
                progress.update(number + 1, accuracy=tally.accuracy)
            if run.checkpoint_due():
                run.checkpoint(number + 1, {
                    "batch": number + 1, "tally": tally.state_dict(), "history": history,
                    "adapter": dict(adapter.state_dict()),
                })  # fmt: skip
    return _summary(config, source, stream, adapter, tally, history)


def _log(run: Run, step: int, tally: Tally, adapter: Adapter) -> dict[str, Any]:
    """Write down a window's accuracy and what the experts do; returns the latter."""
    use = use_of_experts(adapter)
    scalars = {"accuracy/window": tally.curve[-1], "accuracy/so far": tally.accuracy,
               "adapter/skipped": float(adapter.skipped)}  # fmt: skip
    scalars |= {f"routing/{key}": value for key, value in use.items()}
    similar = expert_similarity(adapter)
    known = [s for s in similar if s is not None]
    if known:
        scalars["experts/similarity"] = sum(known) / len(known)
    run.log.scalars(step, scalars)
    return {"batch": step, **use, **({"similarity": similar} if similar else {})}


def _summary(
    config: Config,
    source: ShiftSource,
    stream: Stream,
    adapter: Adapter,
    tally: Tally,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """What summary.json holds: nothing that changes from run to run."""
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    return {
        "method": config.method.part.name, "data": source.name, "stream": config.streams[0],
        "order": config.order, "seed": config.seed, "images": stream.num_images,
        "accuracy": tally.accuracy, "domains": tally.domains(), "curve": tally.curve,
        "steps": adapter.steps, "skipped": adapter.skipped, "trained": trained, "history": history,
    }  # fmt: skip


def _source_batches(
    config: Config, source: ShiftSource, count: int, device: torch.device
) -> Iterator[Tensor]:
    """Clean images, a random choice: training images where there are some, else validation's."""
    generator = seeding.generator(config.seed, "source-images")
    if isinstance(source, Embedded):
        images = source.training_images()[0]
        chosen = torch.randperm(len(images), generator=generator)[:count]
        parts = (images[part] for part in chosen.split(config.batch_size))
    else:
        clean = source.other("clean")
        chosen = torch.randperm(len(clean), generator=generator)[:count]
        parts = (clean.images(part.tolist()) for part in chosen.split(config.batch_size))
    for part in parts:
        yield normalise(part.to(device), source.mean, source.std)


def _check(config: Config) -> None:
    """Refuse settings that cannot work before any work is done."""
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


def _safe(text: str) -> str:
    """A label as part of a folder's name."""
    return "".join(c if c.isalnum() or c in "+._-" else "-" for c in text)
