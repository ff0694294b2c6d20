"""Adapted models, to be exported and made again without their streams."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from cl_benchmarks.stem_vit import StemViT, sizes_of
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.experiments.tta.frozen import FrozenFront, with_front
from dynmoe.experiments.tta.models import empty_model
from dynmoe.experiments.tta.session import make_adapter, shifted
from dynmoe.experiments.tta.settings import Config
from dynmoe.experiments.tta.source_model import Shared, small_vit
from dynmoe.lab.export import Exporter, no_checkpoint
from dynmoe.tta.adapter import Adapter

AGAIN = "delete it, and run it again with --keep-model"


class AdapterExporter(Exporter):
    """The method with its model, as the stream has left them; it can go on adapting."""

    def state(
        self, folder: Path, config: Config, shared: Shared, saved: dict[str, Any] | None, part: str
    ) -> dict[str, Any]:
        """The adapter's state and start, a frozen front part's weights, and the model's sizes."""
        if saved is None:
            raise no_checkpoint(folder, AGAIN)
        batches = len(shifted(config, shared.source))
        if (folder / "summary.json").is_file() and saved["batch"] < batches:
            raise UserError(
                f"the newest checkpoint of {folder} is of batch {saved['batch']} of {batches}, and "
                f"what came after it was not kept; {AGAIN}"
            )
        adapter = make_adapter(config, copy.deepcopy(shared.model))
        adapter.load_state_dict(saved["adapter"])
        front, stem, inner = shared.model, None, shared.model
        if isinstance(front, FrozenFront):
            inner = front.model
            stem = front.hidden_state()
        return {
            "classes": shared.source.num_classes,
            "sizes": sizes_of(inner) if isinstance(inner, StemViT) else {},
            "stem": stem,
            "start": adapter.get_start(),
            "weights": dict(adapter.state_dict()),
        }

    def network(self, config: Config, state: dict[str, Any]) -> Adapter:
        """The adapter: images [B, 3, S, S] -> logits [B, classes], learning from each batch."""
        classes = state["classes"]
        if config.data == "embedded":
            with seeding.seeded(config.vit.seed, "source-model"):
                model: nn.Module = small_vit(config.vit, config.embedded.size, classes).eval()
        else:
            model = with_front(empty_model(config, classes, state["sizes"]))
        if isinstance(model, FrozenFront) and state["stem"] is not None:
            model.load_hidden_state(state["stem"])
        adapter = make_adapter(config, model)
        adapter.load_state_dict(state["weights"])
        adapter.set_start(state["start"])
        return adapter

    def usage(self, config: Config, shared: Shared, part: str) -> str:
        """Shapes, how pixels become input, and what a call does."""
        mean, std = (" ".join(f"{v:.4g}" for v in own) for own in
                     (shared.source.mean, shared.source.std))  # fmt: skip
        classes = shared.source.num_classes
        return (
            f"`model(images)`: float32 [B, 3, S, S] -> logits [B, {classes}], **and adapts to the "
            f"batch**, as it did along the stream; `model.model(images)` gives logits without. "
            f"Images: pixels / 255, minus {mean}, divided by {std} (by channel). The source "
            "model's own licence holds besides."
        )
