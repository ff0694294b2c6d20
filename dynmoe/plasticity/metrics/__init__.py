"""Plasticity metrics. A new one: a class in one of these files, and a line here."""

from dynmoe.plasticity.metrics.dormant import Dormant as Dormant
from dynmoe.plasticity.metrics.norms import Norms as Norms
from dynmoe.plasticity.metrics.norms import RouterUse as RouterUse
from dynmoe.plasticity.metrics.rank import ExpertFeatures as ExpertFeatures
from dynmoe.plasticity.metrics.rank import Rank as Rank
