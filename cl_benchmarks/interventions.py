"""All interventions by name: those for any network, and replay, which needs the stream's batches."""

import dynmoe.interventions as for_any_network
from cl_benchmarks.replay import Replay

__all__ = ["Replay", "for_any_network"]
