"""The batch of a training step: as many images of each source domain.

Of processes that share a run each has every P-th image of each domain, and so as many as the
others: what is a mean over images is the mean of theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
