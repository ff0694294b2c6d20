"""What a router decided for a batch: the record that banks, losses and diagnostics read.

Shapes: N samples (or tokens), M most experts the layer can hold, E living experts, K experts chosen
per sample. Gates are always M wide; experts that do not exist yet have gate 0 and logit -inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Routing:
    """One routing decision.

    Dense routers leave `indices` empty: every expert is used, weighted by `gates`. Sparse routers
    fill it; then `gates` holds the chosen experts' weights and exact zeros elsewhere.
    """

    gates: Tensor
    """[N, M] weight of each expert for each sample, >= 0"""
    logits: Tensor
    """[N, M] scores before normalisation; -inf for experts that do not exist yet"""
    probabilities: Tensor
    """[N, M] softmax of the logits over the living experts; equals `gates` for dense routers"""
    alive: Tensor
    """[M] bool, which experts exist"""
    indices: Tensor | None = None
    """[N, K] chosen experts, or None for dense routing"""

    @property
    def weights(self) -> Tensor:
        """[N, K] gates of the chosen experts (sparse routing only)."""
        assert self.indices is not None
        return self.gates.gather(1, self.indices)


def load_balance(routing: Routing) -> Tensor:
    """Switch Transformer's balancing loss, `E * sum_e f_e P_e`. Scalar; 1 at perfect balance.

    f_e is the share of samples whose largest logit is expert e's (over the K chosen ones for
    sparse routing), P_e the mean probability of e. Source: Fedus et al. 2021 (arXiv 2101.03961),
    Eqs. 4-6.
    """
    chosen = routing.indices
    if chosen is None:
        chosen = routing.logits.argmax(dim=1, keepdim=True)
    counts = torch.zeros_like(routing.gates).scatter_(1, chosen, 1.0)
    share = counts.mean(dim=0) / chosen.shape[1]
    mean_probability = routing.probabilities.mean(dim=0)
    return routing.alive.sum() * (share * mean_probability).sum()
