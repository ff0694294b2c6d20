"""No intervention."""

from __future__ import annotations

from dynmoe.interventions.intervention import Intervention


class NoIntervention(Intervention, name="none", source="ours"):
    """Plain training."""
