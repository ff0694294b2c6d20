"""Freed memory stays with the process; in a process of its own, for the setting is for good."""

from __future__ import annotations

import platform
import subprocess
import sys

SCRIPT = """
import resource, torch
from dynmoe.lab.device import keep_freed_memory

def use(times):
    for _ in range(times):
        assert torch.ones(100 * 2**20)[-1] == 1

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use(times)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
use(1)
plain = faults(3)
returned = keep_freed_memory(), keep_freed_memory()
use(4)  # the heap grows, and its pages are touched for the first time
print(plain / 3, faults(8) / 8, *returned)
"""
GLIBC = platform.libc_ver()[0] == "glibc"
SIZE, PAGE, HUGE_PAGE = 400 * 2**20, 2**12, 2**21
"""Bytes of the tensor: more than the 32 MiB above which glibc maps new blocks by default, and more
than what it leaves at the heap's end when it gives memory back."""


def test_large_tensors_are_mapped_once() -> None:
    """Without the setting all pages of a tensor are touched each time."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    plain, kept, *returned = done.stdout.split()
    assert returned == [str(GLIBC)] * 2
    if GLIBC:
        assert SIZE / HUGE_PAGE <= float(plain) <= 1.1 * SIZE / PAGE
        assert float(kept) < float(plain) / 4  # nearly always 0: now and then the heap must grow
