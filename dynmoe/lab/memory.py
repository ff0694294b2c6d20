"""Keeping freed memory in the process, which makes large activations cheap on the CPU."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt(3)."""
KEPT_BYTES = 2**31 - 1
TOP_PAD_BYTES = 2**28


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
