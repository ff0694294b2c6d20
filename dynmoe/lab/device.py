"""Choosing the device, making it repeat its numbers, and keeping freed memory on the CPU."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

from dynmoe.errors import UserError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt(3)."""
KEPT_BYTES = 2**31 - 1
TOP_PAD_BYTES = 2**28


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


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from its heap and to keep what is freed; from now on.

    By default every tensor above 32 MiB at most is a new mapping and its pages are zeroed by the
    kernel at first touch, again at every step: for convolutions on frames that is half of the time.
    The price is that memory, once used, stays with the process.

    Returns:
        whether it took effect; False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEPT_BYTES), (M_TOP_PAD, TOP_PAD_BYTES))
    return all([libc.mallopt(parameter, value) == 1 for parameter, value in settings])
