"""New experts drawn at random, as the paper does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynmoe.growth.init import Init, Plan, Request, cut_plan
from dynmoe.registry import PartConfig


class RandomInit(Init, name="random", source="Kim 2025 (arXiv 2511.18987)"):
    """New experts and their router rows are drawn afresh (DynamicMoE, arXiv 2511.18987).

    The function is not preserved, by choice of the paper.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the random init."""

        router: Literal["new", "all"] = "all"
        """which router rows are drawn: the new experts' (the paper), or every expert's, which lets
        a router that has settled share its samples out anew"""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.redraw_router = config.router == "all"

    def plan(self, request: Request) -> Plan:
        """Cut the old experts to size, draw the rest."""
        plan = cut_plan(request)
        plan.redraw_router = self.redraw_router
        return plan
