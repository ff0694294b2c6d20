"""The Switch Transformer's balancing loss."""

from __future__ import annotations

from torch import Tensor

from dynmoe.moe.loss import AuxLoss, LossInput


class SwitchLoss(AuxLoss, name="switch", source="Fedus et al. 2021 (arXiv 2101.03961), Eqs. 4-6"):
    """Load balancing by f.P: `E * sum_e f_e P_e`; 1 at perfect balance, E at collapse.

    f_e is the share of picks that go to expert e (the chosen experts, or the largest logit's for
    dense routing) and has no gradient; P_e is e's mean probability. Also Eq. 5 of Zhang et al. 2025
    (arXiv 2507.11181), which leaves the factor E to alpha.
    """

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the batch."""
        routing = given.routing
        picks = routing.mean(routing.picks())
        share = picks / picks.sum().clamp_min(1e-12)
        return routing.alive.sum() * (share * routing.mean(routing.probabilities)).sum()
