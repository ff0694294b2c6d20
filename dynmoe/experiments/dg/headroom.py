"""What a perfect router of a method's experts could reach, and whether gates tell domains apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynmoe.dg.method import DGMethod
from dynmoe.experiments.dg.measure import Batches


@torch.no_grad()
def headroom(method: DGMethod, batches: Batches) -> dict[str, float]:
    """Accuracies of a method's experts alone; none where it has no experts.

    Args:
        method: in evaluation mode.
        batches: of the images.

    Returns:
        best_per_image: share of images for which any expert is right, the bound of all routers that
        pick one. best_expert: of the best single one. mean_expert: their mean.
    """
    right = []
    for images, known, labels in batches:
        logits = method.expert_logits(images, known)
        if logits is None:
            return {}
        right.append(logits.argmax(dim=2).cpu() == labels)
    return oracle(torch.cat(right, dim=1))


def oracle(right: Tensor) -> dict[str, float]:
    """The figures of `headroom` from bool [K, N], whether each expert is right."""
    each = right.double().mean(dim=1)
    return {
        "best_per_image": float(right.any(dim=0).double().mean()),
        "best_expert": float(each.max()),
        "mean_expert": float(each.mean()),
    }


def gate_figures(gates: list[Tensor]) -> dict[str, float]:
    """Whether gates [N_d, K] of each source domain's images tell the domains apart.

    Returns:
        gate_nmi: mutual information of the largest gate's expert and the domain, over the mean of
        their entropies (Strehl and Ghosh 2002, JMLR 3; by scikit-learn): 0 where gates know nothing
        of domains, 1 where each domain has an expert of its own. gate_entropy: mean entropy of the
        gates over ln K: 1 where all are even. Nothing for no gates, and for one expert.
    """
    if not gates or gates[0].shape[1] < 2:
        return {}
    from sklearn.metrics import normalized_mutual_info_score

    together = torch.cat(gates).double().cpu()
    domains = torch.cat([torch.full((len(g),), d) for d, g in enumerate(gates)])
    nmi = normalized_mutual_info_score(domains.numpy(), together.argmax(dim=1).numpy())
    entropy = -torch.special.xlogy(together, together).sum(dim=1).mean()
    return {
        "gate_nmi": float(nmi),
        "gate_entropy": float(entropy) / math.log(together.shape[1]),
    }
