"""Choosing the device, and making it repeat its numbers."""

from __future__ import annotations

import os

import torch

from dynmoe.errors import UserError


def resolve(name: str) -> torch.device:
    """The device for a `--device` value: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu or --device auto"
        )
    return device


def make_deterministic(device: torch.device) -> None:
    """Ask torch for repeatable kernels on CUDA; on the CPU they are repeatable as they are."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
