"""That a burst of large buffers goes back to the system although small ones between them stay."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from kvpool.allocator import bound_heaps

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

if sys.argv[1] == "bound":
    assert bound_heaps()
kept = []
for _ in range(2):  # glibc learns from the first that such buffers are common
    burst = []
    for _ in range(200):
        burst.append(bytearray(b"x") * 300_000)
        kept.append(bytearray(b"y") * 60_000)
    before = resident()
    burst.clear()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="bounds are glibc's")
def test_what_a_burst_took_goes_back():
    freed = {}
    for how in ("bound", "free"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        freed[how] = int(done.stdout)
    assert freed["bound"] > 200 * 300_000 * 0.9
    assert freed["free"] < 200 * 300_000 * 0.5
