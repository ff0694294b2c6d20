"""MGTTA: a learned optimizer, which cannot be had without its authors' file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter


class Mgtta(Adapter, name="mgtta", source="a baseline of Fan et al. 2025 (arXiv 2511.13760)"):
    """The affines of LayerNorms moved by a learned optimizer; says what it would need."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """MGTTA has no options here."""

    def prepare(self) -> None:
        """Refuse.

        Raises:
            UserError: always.
        """
        raise UserError(
            "mgtta moves weights by a learned optimizer: it needs its authors' checkpoint "
            "(mgg_ckpt.pth), their code for it and statistics of the source, none of which comes "
            "with dynmoe; use another method"
        )

    def adapt(self, images: Tensor) -> Tensor:
        """Never reached."""
        return self.model(images)
