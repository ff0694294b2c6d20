"""MoE²'s Lemma 1 (the router identity), and how far mixing parameters departs from it.

Lemma 1 is about predictors that mix the experts' class probabilities, `f_y = w . S_y`. MoE² mixes
parameters, for which it does not hold; `departure` measures by how much.

Shapes: B samples, K experts, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.dg.backbone import features
from dynmoe.moe.model import undisturbed

if TYPE_CHECKING:
    from dynmoe.dg.methods.moe2 import MoE2


def router_identity(p: Tensor, w: Tensor, experts: Tensor, labels: Tensor) -> Tensor:
    """[B] `log((p . S_y) / (w . S_y))`, the excess loss of routing by w where p is right (Eq. 6).

    Args:
        p, w: [B, K] weights that add up to 1.
        experts: [B, K, C] class probabilities of each expert.
        labels: [B] classes y.
    """
    own = experts.gather(2, labels.view(-1, 1, 1).expand(-1, experts.shape[1], 1)).squeeze(2)
    return torch.log((p * own).sum(dim=1)) - torch.log((w * own).sum(dim=1))


@torch.no_grad()
def departure(method: MoE2, images: Tensor, labels: Tensor) -> dict[str, float]:
    """What mixing parameters gives against mixing the same experts' probabilities.

    Costs a pass per expert. All means are over the batch.

    Args:
        method: in any mode; it is left as it was.
        images: [B, 3, H, W].
        labels: [B].

    Returns:
        kl: mean KL(mixed outputs || mixed parameters), nats. loss_change: mean cross-entropy with
        mixed parameters minus with mixed outputs, 0 where Lemma 1 would hold. loss_change_abs: mean
        of its absolute value per sample. agreement: share of equal decisions. spread: mean KL of
        an expert from the mixed outputs (weighted), to compare `kl` with: 0 where experts agree.
    """
    with undisturbed(method):
        embedding = features(method.backbone, images)
        gates = method.outer.router(embedding).gates[:, : method.outer.num_experts]
        mixed = method(images, embedding).log_softmax(dim=1)
        count = gates.shape[1]
        alone = torch.eye(count, dtype=gates.dtype, device=gates.device)
        each = torch.stack(
            [
                method.forward_with(images, row.expand(len(images), -1)).log_softmax(dim=1)
                for row in alone
            ],
            dim=1,
        )
    oracle = torch.log((gates.unsqueeze(2) * each.exp()).sum(dim=1))
    change = F.nll_loss(mixed, labels, reduction="none") - F.nll_loss(
        oracle, labels, reduction="none"
    )
    spread = (each.exp() * (each - oracle.unsqueeze(1))).sum(dim=2)
    return {
        "kl": float((oracle.exp() * (oracle - mixed)).sum(dim=1).mean()),
        "loss_change": float(change.mean()),
        "loss_change_abs": float(change.abs().mean()),
        "agreement": float((oracle.argmax(1) == mixed.argmax(1)).float().mean()),
        "spread": float((gates * spread).sum(dim=1).mean()),
    }
