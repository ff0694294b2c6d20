"""The batch of a training step: as many images of each source domain.

Of processes that share a run each has every P-th image of each domain, and so as many as the
others: what is a mean over images is the mean of theirs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cl_benchmarks.domain_set import batch_indices
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.experiments.dg.settings import Config
from dynmoe.lab import processes

if TYPE_CHECKING:
    from dynmoe.experiments.dg.fold import Fold


class Batch(NamedTuple):
    """What `DGMethod.loss` takes; B images, domain after domain."""

    images: Tensor
    """[B, 3, S, S], or what stands for them"""
    labels: Tensor
    """[B] int64"""
    embeddings: Tensor | None
    """[B, E] frozen embeddings; None where they are not kept"""
    domains: Tensor
    """[B] numbers of their source domains, from 0"""


def training_batch(fold: Fold) -> Batch:
    """This process's images of the step that comes next, on the run's device."""
    config, trial, device = fold.config, fold.trial, fold.trial.run.device
    images, labels, embeddings = [], [], []
    for number in fold.sources:
        domain, seed = trial.source.data.domains[number], config.seed
        chosen = batch_indices(trial.splits[number][0], config.batch_size, fold.step, seed, number)
        own = processes.own_rows(chosen)
        if config.augment:  # all are augmented, as each takes its numbers from one generator
            generator = seeding.generator(seed, "augment", *fold.out, number, fold.step)
            shown = trial.source.prepare.batch(domain, chosen, generator)
            images.append(processes.own_rows(shown))
        else:
            images.append(trial.source.prepare.batch(domain, own))
            embedding = trial.embedding(fold.method, number)
            if embedding is not None:
                embeddings.append(embedding[own.to(device)])
        labels.append(domain.labels[own])
    domains = torch.arange(len(fold.sources), device=device).repeat_interleave(len(own))
    known = torch.cat(embeddings) if embeddings else None
    return Batch(torch.cat(images).to(device), torch.cat(labels).to(device), known, domains)


def check_shared(config: Config) -> None:
    """Refuse a batch that processes cannot share evenly.

    Two images of each domain for each of them: a method may train on halves of a domain's.

    Raises:
        UserError: names the setting and what works.
    """
    count = processes.size()
    if count > 1 and config.batch_size % (2 * count):
        raise UserError(
            f"{count} processes cannot share --batch-size {config.batch_size}; use a multiple of "
            f"{2 * count}, twice their number"
        )


def check_batches(found: dict[str, Config], own: str, domains: int) -> None:
    """Refuse methods that batches of the data do not suit, before any of them is trained.

    Args:
        found: name of a method -> its settings.
        own: the method of `--method`; the others have no options.
        domains: of the data set.

    Raises:
        UserError: names the setting and what works.
    """
    for name, config in found.items():
        part: Any = config.method.part
        if config.batch_size < part.least_images:
            raise UserError(
                f"method {name} needs {part.least_images} images of each source domain in a batch; "
                f"use --batch-size {part.least_images} or more (now {config.batch_size})"
            )
        least = part.least_evaluations(config.method)
        planned = math.ceil(config.steps / config.eval_every)
        if planned < least:
            often = f"--eval-every {max(1, config.steps // (4 * least))}"
            way = often if config.steps >= least else f"--steps {least} or more"
            raise UserError(
                f"method {name} needs {least} evaluations, and --steps {config.steps} with "
                f"--eval-every {config.eval_every} have {planned}; use {way} or another method"
            )
        if option := part.unfit(config.method, domains - 1):
            flags = f"--method.{option} {domains - 1}"
            way = flags if name == own else f"--method {name} {flags}, not --compare {name}"
            way = way if domains > 2 else f"data with 3 domains or more, not {domains}"
            raise UserError(
                f"method {name} has {option}={getattr(config.method, option)}, and there are "
                f"{domains - 1} source domains; use {way}"
            )
        if config.selection == "held-out-domain" and part.unfit(config.method, domains - 2):
            raise UserError(
                f"--selection held-out-domain also trains on {domains - 2} source domains, for "
                f"which method {name} would need other options; use another --selection"
            )
