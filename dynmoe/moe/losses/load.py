"""Balancing by smooth load: every expert is as likely to be picked by a noisy router."""

from __future__ import annotations

from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.loss import AuxLoss, LossInput
from dynmoe.moe.losses.importance import cv_squared


class LoadLoss(
    AuxLoss, name="load", source="Shazeer et al. 2017 (arXiv 1701.06538), Appendix A, Eq. 11"
):
    """Squared coefficient of variation of the experts' smooth load, for noisy routers.

    The smooth load of an expert is the sum over samples of the chance that fresh noise makes the
    router pick it (`Routing.load`). 0 with one living expert; variance as in `importance`.
    """

    def forward(self, given: LossInput) -> Tensor:
        """The loss of the batch.

        Raises:
            UserError: the router gives no smooth load.
        """
        load = given.routing.load
        if load is None:
            raise UserError(
                f"load loss: router {given.router.name!r} gives no smooth load; take a noisy one "
                "such as 'noisy-topk', or the loss 'importance'"
            )
        return cv_squared(given.routing.mean(load), given.routing.alive)
