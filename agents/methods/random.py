"""No network at all."""

from __future__ import annotations

from agents.methods.dense import Dense


class Random(Dense, name="random"):
    """Every action equally often: the floor that any learning must leave."""

    learns = False
    acts = False
