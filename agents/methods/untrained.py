"""A network that never learns."""

from __future__ import annotations

from agents.methods.dense import Dense


class Untrained(Dense, name="untrained"):
    """The dense network as it is drawn: what acting without learning returns."""

    learns = False
