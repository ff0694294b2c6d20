"""New experts that say nothing at first."""

from __future__ import annotations

from collections import Counter

from dynmoe.growth.init import FRESH, Init, Plan, Request, choose_parents, cut_plan, share_gates


class ZeroOutputInit(Init, name="zero-output"):
    """Fresh input weights, zero output weights; takes part of a parent's gate.

    The parent's output is scaled up by what its gate loses, so adding the expert leaves the
    layer's function unchanged for dense softmax gates. What the constant budget cuts from old
    experts is a change of its own, shown by the growth shock.
    """

    def plan(self, request: Request) -> Plan:
        """Cut as the budget asks; parents share their gates with silent children."""
        plan = cut_plan(request)
        parents = choose_parents(request.sizes, request.new)
        share_gates(plan, parents)
        children = Counter(parents)
        experts = len(request.sizes)
        for expert, (units, factor) in enumerate(
            zip(plan.source.split(plan.sizes), plan.factor.split(plan.sizes), strict=True)
        ):
            loss = (1 + children[expert]) * request.scale
            kept = units != FRESH
            factor[kept] = loss
            plan.bias_factor[expert] = loss
            if expert >= experts:
                factor[:] = 0.0
                plan.bias_factor[expert] = 0.0
        return plan
