"""Interventions by name: those for any network, and replay, which needs the batches of a stream."""

import dynmoe.interventions as for_any_network
from cl_benchmarks.replay import Replay

__all__ = ["Replay", "for_any_network"]
