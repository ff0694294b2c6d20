"""No strategy."""

from __future__ import annotations

from cl_benchmarks.intervention import Intervention


class NoStrategy(Intervention, name="none", source="ours"):
    """Plain training."""
