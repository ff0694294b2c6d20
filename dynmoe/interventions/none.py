"""No strategy."""

from __future__ import annotations

from dynmoe.interventions.intervention import Intervention


class NoStrategy(Intervention, name="none", source="ours"):
    """Plain training."""
