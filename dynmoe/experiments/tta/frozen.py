"""A frozen front part of a model: hidden from all methods, and computed once for an image.

A model has one where it has a child `stem` and methods `features(images)` and
`transformer(features)`, its forward being the one after the other. Methods then adapt the rest
alone: the stem's BatchNorms keep their statistics, and no method finds its weights. The features of
the stream's images are kept in the cache folder, a file for each domain (`dynmoe.lab.kept_rows`),
so that every method and seed reads them. An image is known by its place in its domain, and a front
part by what it makes of a fixed image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_benchmarks.shifts.domain import Domain
from dynmoe import seeding
from dynmoe.lab import cache
from dynmoe.lab.kept_rows import KeptRows


class Hidden(nn.Module):
    """A module whose tensors are no parameters or buffers of the model around it; never trained."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._held = [module.eval().requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        """What the module makes of x; shapes are the module's."""
        return self._held[0](x)

    def hidden_state(self) -> dict[str, Tensor]:
        """The module's tensors, by name, in their shapes."""
        return self._held[0].state_dict()

    def load_hidden_state(self, state: dict[str, Tensor]) -> None:
        """Restore `hidden_state()`, names and shapes being the same."""
        self._held[0].load_state_dict(state)

    def _apply(self, fn: Any, recurse: bool = True) -> Hidden:
        super()._apply(fn, recurse)
        self._held[0]._apply(fn, recurse)
        return self


class FrozenFront(nn.Module):
    """Images [B, 3, S, S] -> logits [B, classes], through a frozen front part.

    Args:
        model: with `stem`, `features` and `transformer`; its stem is hidden, in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model.stem = Hidden(model.stem)  # type: ignore[arg-type]
        self.model = model
        self._known: tuple[Tensor, Tensor] | None = None
        self._of_one: Tensor | None = None
        self._files: dict[tuple[str, str], KeptRows] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, S, S].

        The front part is not computed for the images that were `offer`ed last.
        """
        if self._known is not None and self._known[0] is images:
            features = self._known[1]
        else:
            with torch.no_grad():
                features = self.model.features(images)  # type: ignore[operator]
        return self.model.transformer(features)  # type: ignore[operator]

    def hidden_state(self) -> dict[str, Tensor]:
        """The front part's tensors, by name, in their shapes."""
        return self._stem.hidden_state()

    def load_hidden_state(self, state: dict[str, Tensor]) -> None:
        """Restore `hidden_state()`, names and shapes being the same."""
        self._stem.load_hidden_state(state)

    @property
    def _stem(self) -> Hidden:
        stem = self.model.stem
        assert isinstance(stem, Hidden)
        return stem

    @torch.no_grad()
    def offer(self, images: Tensor, places: Sequence[tuple[Domain, int]], about: str) -> None:
        """Have the features of these images ready, from the cache folder if they are there.

        They are used for this very tensor alone, which must not change; what a method makes of it,
        such as views of an image, is computed as ever. Each image goes through the front part by
        itself, so that its features do not depend on its batch.

        Args:
            images: [B, 3, S, S], as the model takes them.
            places: [B] the domain of each, and its index there.
            about: what was done to the domains' images to make these, such as their normalisation.
        """
        if self._of_one is None:
            self._of_one = self._probe(images)
        found = []
        for one, (domain, index) in zip(images, places, strict=True):

            def make(_: list[int], one: Tensor = one) -> np.ndarray:
                return self.model.features(one[None]).cpu().numpy()  # type: ignore[operator]

            values = self._rows(domain, about).rows([index], make)
            found.append(torch.from_numpy(values[0]))
        self._known = (images, torch.stack(found).to(images))

    def _rows(self, domain: Domain, about: str) -> KeptRows:
        """The file of a domain's features."""
        known = self._files.get((domain.identity, about))
        if known is None:
            name = cache.digest({"images": domain.identity, "about": about, "size": len(domain)})
            of_one = self._of_one
            assert of_one is not None
            known = KeptRows(
                f"features-{_digest(of_one)}/{name}",
                len(domain),
                tuple(of_one.shape[1:]),
                of_one.numpy().dtype.type,
            )
            self._files[domain.identity, about] = known
        return known

    def _probe(self, images: Tensor) -> Tensor:
        """[1, ...] features of a fixed image of the size, dtype and device of these."""
        generator = seeding.generator(0, "probe")
        probe = torch.rand((1, *images.shape[1:]), generator=generator).to(images)
        return self.model.features(probe).cpu()  # type: ignore[operator]


def with_front(model: nn.Module) -> nn.Module:
    """The model with its front part hidden, where it has one; else as it is."""
    parts = ("stem", "features", "transformer")
    return FrozenFront(model) if all(hasattr(model, part) for part in parts) else model


def offer(
    model: nn.Module, images: Tensor, places: Sequence[tuple[Domain, int]], about: str
) -> Tensor:
    """The images [B, 3, S, S], once a frozen front part of the model, if any, knows them.

    The other arguments are those of `FrozenFront.offer`.
    """
    if isinstance(model, FrozenFront):
        model.offer(images, places, about)
    return images


def _digest(values: Tensor) -> str:
    """Of a tensor's values."""
    data = values.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()
