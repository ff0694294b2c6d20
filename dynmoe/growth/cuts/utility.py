"""Keep the units that contribute most."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.growth.cut import Cut
from dynmoe.moe.bank import UnitBank


class UtilityCut(
    Cut,
    name="utility",
    source="Dohare et al. 2024 (Nature 632), contribution utility; over one batch, ours",
):
    """Keeps the units of largest contribution utility, mean |h| * sum |w_out|.

    Source: Dohare et al. 2024 (Nature 632, continual backpropagation), contribution utility, with
    the mean over one probe batch instead of a running one.
    """

    def scores(
        self, bank: UnitBank, mean_activation: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Contribution utility [H]; needs a probe batch."""
        if mean_activation is None:
            raise UserError("the utility cut needs a probe batch: pass probe= to the growth step")
        outgoing = bank.output_weight().detach().abs().transpose(0, 1).flatten(1).sum(dim=1)
        return (mean_activation * outgoing).cpu()
