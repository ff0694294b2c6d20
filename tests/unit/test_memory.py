"""Freed memory stays with the process; in a process of its own, for the setting is for good."""

from __future__ import annotations

import platform
import subprocess
import sys

SCRIPT = """
import resource, torch
from dynmoe.memory import keep_freed_memory

def use(times):
    for _ in range(times):
        tensors = [torch.ones(12 * 2**20) for _ in range(2)]
        assert sum(t[-1] for t in tensors) == 2

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use(times)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
use(2)
plain = faults(4)
returned = keep_freed_memory(), keep_freed_memory()
use(10)  # the heap grows in steps of 256 MiB, whose pages are touched for the first time
print(plain, faults(4), *returned)
"""
GLIBC = platform.libc_ver()[0] == "glibc"
SIZE, PAGE, HUGE_PAGE = 2 * 48 * 2**20, 2**12, 2**21
"""Bytes of the two tensors: above 32 MiB each, glibc maps blocks anew by default."""


def test_large_tensors_are_mapped_once() -> None:
    """Four times two tensors: without the setting all their pages are touched each time."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    plain, kept, *returned = done.stdout.split()
    assert returned == [str(GLIBC)] * 2
    if GLIBC:
        assert int(plain) >= 4 * SIZE / HUGE_PAGE and int(plain) <= 5 * SIZE / PAGE
        assert int(kept) < int(plain) / 20
