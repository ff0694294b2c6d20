"""What a method costs: images per second, memory, trained parameters; and options by stream."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dynmoe.lab.files import write_json
from dynmoe.lab.report import print_table
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.measures import kept_for_backward

FILE = "cost.json"
"""In a run's folder; apart from its summary, which is the same whenever it is made."""


class Cost:
    """Time of a run's steps; what a resumed run has done before does not count."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.images, self.seconds = device, 0, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def step(self, images: int) -> Iterator[None]:
        """Time a step on so many images."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.images, self.seconds = self.images + images, self.seconds + time.perf_counter() - began

    def write(self, folder: Path, adapter: Adapter, images: Tensor) -> None:
        """Write `cost.json`: images_per_s, and mib, for images [B, C, H, W]; see `print_costs`."""
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = kept_for_backward(adapter.model, images)
        speed = self.images / self.seconds if self.seconds else None
        write_json(folder / FILE, {"images_per_s": speed, "mib": memory / 2**20})


def print_costs(
    streams: dict[str, dict[str, list[dict[str, Any]]]], folders: dict[str, dict[str, list[Path]]]
) -> None:
    """Per stream and method: trained parameters, speed, memory, and options by stream.

    Args:
        streams: stream -> method's label -> summaries, one per seed.
        folders: of these runs.
    """
    rows = [["method", "stream", "trained", "images/s", "MiB", "options by stream"]]
    for stream, variants in streams.items():
        for label, own in variants.items():
            found = [json.loads((f / FILE).read_text()) for f in folders[stream][label]
                     if (f / FILE).is_file()]  # fmt: skip
            speeds = [one["images_per_s"] for one in found if one["images_per_s"]]
            sizes = [one["mib"] for one in found]
            options = own[0].get("options", {})
            rows.append([
                label, stream, f"{own[0]['trained']:,}",
                f"{median(speeds):,.0f}" if speeds else "", f"{max(sizes):.1f}" if sizes else "",
                ", ".join(f"{name} {value}" for name, value in options.items()),
            ])  # fmt: skip
    print_table("cost", rows, "median over seeds, beside whatever else the machine did; MiB: most "
                "allocated on a GPU, else what a forward pass of the last batch keeps for the "
                "backward pass")  # fmt: skip
