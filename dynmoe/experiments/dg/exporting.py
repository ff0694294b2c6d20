"""Networks of left-out domains: kept by a run, exported, and made again without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cl_benchmarks.stem_vit import StemViT, sizes_of
from dynmoe import seeding
from dynmoe.dg.method import DGMethod
from dynmoe.experiments.dg.settings import Config
from dynmoe.experiments.dg.source import Source, empty_backbone
from dynmoe.lab import checkpoint
from dynmoe.lab.export import Exporter, no_checkpoint


def keep_network(folder: Path, test: int, step: int, method: DGMethod) -> None:
    """Keep what a method has learnt with domain number `test` left out, in a run's folder."""
    state = method.learned_state()
    checkpoint.save(_place(folder, test), step, {"step": step, "state": state})


def _place(folder: Path, test: int) -> Path:
    return folder / "models" / str(test)


class DomainExporter(Exporter):
    """The network after the last step with one domain left out, backbone included."""

    def parts(self, config: Config, shared: Source) -> list[str]:
        """The left-out domains."""
        return [shared.data.names[number] for number in shared.tests]

    def state(
        self, folder: Path, config: Config, shared: Source, saved: dict[str, Any] | None, part: str
    ) -> dict[str, Any]:
        """All weights, and the sizes that the make follows from."""
        kept = checkpoint.load_latest(_place(folder, shared.data.names.index(part)))
        if kept is None:
            raise no_checkpoint(
                folder, f"nothing of {part}: delete it, and run it again with --keep-model"
            )
        backbone = shared.new_backbone()
        sizes = sizes_of(backbone) if isinstance(backbone, StemViT) else {}
        method = _new_method(config, backbone, len(shared.data.classes), part)
        method.load_learned_state(kept["state"])
        return {
            "classes": list(shared.data.classes), "sizes": sizes, "part": part,
            "weights": method.state_dict(),
        }  # fmt: skip

    def network(self, config: Config, state: dict[str, Any]) -> nn.Module:
        """The method: images [B, 3, S, S] -> logits [B, classes]."""
        backbone = empty_backbone(config, state["sizes"])
        method = _new_method(config, backbone, len(state["classes"]), state["part"])
        method.load_state_dict(state["weights"])
        return method.eval()

    def usage(self, config: Config, shared: Source, part: str) -> str:
        """Shapes, how pixels become input, and which weights these are."""
        prepare: Any = shared.prepare
        size, mean, std = (getattr(prepare, name, None) for name in ("size", "mean", "std"))
        made = "pixels / 255"
        if mean is not None:
            made += f", minus {_listed(mean)}, divided by {_listed(std)} (by channel)"
        side = "S, S" if size is None else f"{size}, {size}"
        names = ", ".join(shared.data.classes)
        return (
            f"`model(images)`: float32 [B, 3, {side}] -> logits [B, {len(shared.data.classes)}]. "
            f"Images: {made}. Classes: {names}. Trained on all domains but {part}; weights of the "
            "last step, so the metric that holds for them is that of the last evaluation; metrics "
            "are means over all left-out domains."
        )


def _new_method(config: Config, backbone: Any, classes: int, part: str) -> DGMethod:
    """The method around a backbone; all that it draws is overwritten."""
    return config.method.build(backbone, classes, seeding.generator(config.seed, "weights", part))


def _listed(values: Any) -> str:
    return " ".join(f"{value:.4g}" for value in values)
