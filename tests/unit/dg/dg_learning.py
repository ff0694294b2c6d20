"""Steps of a method on batches that processes may share."""

from __future__ import annotations

import torch
from dg_cases import CLASSES, make
from torch import Tensor

from dynmoe.lab import processes
from dynmoe.moe import finish_step

STEPS, DOMAINS, IMAGES = 3, 3, 4
"""Of each domain a step takes so many images."""


def learn(name: str) -> dict[str, Tensor]:
    """The state of a float64 method after some steps on this process's images of each domain."""
    method = make(name)
    optimizer = torch.optim.SGD(method.trainable(), 0.1)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(DOMAINS, IMAGES, 3, 16, 16, dtype=torch.double, generator=generator)
        labels = torch.randint(CLASSES, (DOMAINS, IMAGES), generator=generator)
        own = processes.own_rows(torch.arange(IMAGES))
        method.train()
        loss, _ = method.loss(
            images[:, own].flatten(0, 1), labels[:, own].flatten(), None,
            torch.arange(DOMAINS).repeat_interleave(len(own)),
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        figure = loss.detach().reshape(1) / processes.size()
        losses.append(processes.average_gradients(method.trainable(), figure))
        optimizer.step()
        finish_step(method)
        method.after_step()
    return {**method.state_dict(), "loss": torch.cat(losses)}
