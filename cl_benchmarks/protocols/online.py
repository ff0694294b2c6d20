"""Streams in time order: one pass, no task boundary told, each row tested before it is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import Chunk, Protocol
from cl_benchmarks.rehearsal import Rehearsal
from dynmoe.errors import UserError


class Online(
    Protocol, name="online", source="Gama et al. 2013 (Machine Learning 90), prequential evaluation"
):
    """A stream in its time order, seen once (--epochs 1); nobody is told of any boundary.

    `--chunks` only says in how many equal windows tables report. Online accuracy, of each batch
    before its update, is the prequential accuracy, and the one to quote. At the end of a window,
    train accuracy is on the rows of that window, which were just learnt, and test accuracy on those
    of the next, which no one has seen; after the last window, on the tail of the stream, which is
    kept for that and never learnt. One gradient step on each row teaches a network little, where
    labels come in blocks: `updates` gives it more, on rows that it keeps. Growth takes a trigger
    that is not told (drift, adwin, plateau, ...); what acts at task starts is refused.
    """

    in_time_order = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of online streams."""

        tail: float = 0.05
        """share of the rows, the last ones, that only the last window's test accuracy uses"""
        updates: int = 1
        """gradient steps per batch: the first on its rows, further ones on rows of late"""
        rows: int = 32
        """rows in each further step, drawn from the latest `window`"""
        window: int = 1000
        """latest rows that are kept for further steps, with those of the batch"""

    def __init__(self, config: Config) -> None:
        if not 0 < config.tail < 1:
            raise UserError(f"protocol tail {config.tail} must lie between 0 and 1")
        for option in ("updates", "rows", "window"):
            if getattr(config, option) < 1:
                raise UserError(
                    f"protocol {option} {getattr(config, option)} is too small; use 1 or more"
                )
        super().__init__(config)

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Windows of rows in order; lengths differ by one at most. The seed decides nothing."""
        total = len(data.train_labels)
        tail = max(1, round(self.config.tail * total))
        if not 1 <= chunks <= total - tail:
            raise UserError(
                f"{chunks} chunks of the {total - tail} rows of {data.name} before its tail; use "
                f"--chunks 1 to {total - tail}"
            )
        rows = torch.arange(total)
        windows = [*rows[: total - tail].tensor_split(chunks), rows[total - tail :]]
        return [
            Chunk(now, data.train_labels[now], after, data.test_labels[after], in_time_order=True)
            for now, after in pairwise(windows)
        ]

    def plugins(self, train: list[Any], others: list[Any], seed: int) -> list[Any]:
        """Further steps on rows of late, where `updates` asks for them."""
        if self.config.updates == 1:
            return []
        kept = self.config.updates - 1, self.config.rows, self.config.window
        return [Rehearsal(*kept, train, others, seed)]

    def no_cumulative(self) -> str | None:
        """Rows are seen once."""
        return "protocol online sees every row once; use --access limited"
