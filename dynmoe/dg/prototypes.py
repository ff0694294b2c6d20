"""What a router of whole images looks at, and where its prototypes start.

Shapes: N images, E width of the embedding, K prototypes.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError

Prototypes = Literal["random", "kmeans", "domains"]
Embedding = Literal["final", "style"]
MOST = 5000
"""Embeddings that k-means sees; more are thinned evenly."""


@torch.no_grad()
def style(backbone: nn.Module, images: Tensor, block: int) -> Tensor:
    """[B, 2 D] mean and standard deviation over the tokens behind a block of a backbone.

    Statistics of early features tell an image's style rather than its content: Huang and Belongie
    2017 (arXiv 1703.06868), Section 3.

    Args:
        images: what the backbone takes.
        block: its number, from 0.
    """
    seen: list[Tensor] = []
    blocks: Any = backbone.blocks
    handle = blocks[block].register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        backbone.forward_features(images)  # type: ignore[operator]
    finally:
        handle.remove()
    (tokens,) = seen
    return torch.cat([tokens.mean(dim=1), tokens.std(dim=1, correction=0)], dim=1)


def kmeans(embedding: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[K, E] centres of length 1 of normalised embeddings [N, E], by k-means++ and Lloyd's steps.

    Arthur and Vassilvitskii 2007 (SODA), by scipy, which this needs. `generator` seeds its draws.

    Raises:
        UserError: fewer embeddings than centres.
    """
    from scipy.cluster.vq import kmeans2

    if len(embedding) < count:
        raise UserError(f"k-means of {count} prototypes needs as many images; {len(embedding)} are")
    points = F.normalize(embedding[:: -(-len(embedding) // MOST)], dim=1).double().cpu().numpy()
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    centres, _ = kmeans2(points, count, iter=50, minit="++", rng=np.random.default_rng(seed))
    return F.normalize(torch.from_numpy(centres).to(embedding), dim=1)


def domain_means(embedding: Tensor, domains: Tensor, count: int) -> Tensor:
    """[K, E] the mean embedding of each source domain, of length 1.

    Args:
        embedding: [N, E].
        domains: [N] numbers 0 .. K-1.
        count: K.

    Raises:
        UserError: there are not K domains.
    """
    found = int(domains.max()) + 1
    if found != count:
        raise UserError(
            f"prototypes=domains gives each source domain an expert; there are {found}, and "
            f"experts={count}: use --method.experts {found}"
        )
    means = torch.stack([embedding[domains == k].mean(dim=0) for k in range(count)])
    return F.normalize(means, dim=1)
