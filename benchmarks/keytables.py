"""What leads from a block's key to its node, at millions of blocks: a dict, two ways in numpy, and the table in C.

``python benchmarks/keytables.py --keys 10000000 --json -``. Each structure runs in a process of its own: bytes a key are what
the process grew by, the longest insertion is one of 64 keys in CPU time, lookups those of chains of 8,192 keys that lie
together, and of 8,192 keys from everywhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

CHAIN = 8192
BATCH = 64


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def batches(count: int) -> Iterator[np.ndarray]:
    """Random keys of 32 bytes, shape (64, 32): what SHA-256 looks like. The same every time."""
    rng = np.random.default_rng(7)
    for _ in range(count // BATCH):
        yield rng.integers(0, 256, (BATCH, 32), np.uint8)


class Dict:
    """What the index was: keys and numbers are Python objects."""

    def __init__(self, count: int) -> None:
        self.numbers: dict[bytes, int] = {}
        self.keys: list[bytes] = []

    def add(self, keys: np.ndarray) -> None:
        for row in keys:
            key = row.tobytes()
            self.numbers[key] = len(self.keys)
            self.keys.append(key)

    def find(self, keys: list[bytes]) -> int:
        get = self.numbers.get
        return int((np.fromiter((get(k, -1) for k in keys), np.int32, len(keys)) >= 0).sum())


class NumpyProbing:
    """Open addressing in arrays, all keys of a call probed at once; doubling rehashes everything."""

    def __init__(self, count: int) -> None:
        self.keys = np.zeros((1024, 4), np.uint64)
        self.slots = np.zeros(2048, np.int32)
        self.used = 0

    def _place(self, numbers: np.ndarray) -> None:
        mask = len(self.slots) - 1
        at = (self.keys[numbers, 0] & np.uint64(mask)).astype(np.int64)
        while len(numbers):
            free = self.slots[at] == 0
            self.slots[at[free]] = numbers[free] + 1  # of several for one slot the last stays
            left = self.slots[at] != numbers + 1
            numbers, at = numbers[left], (at[left] + 1) & mask

    def add(self, keys: np.ndarray) -> None:
        words = keys.view(np.uint64)
        if self.used + len(words) > len(self.keys):
            self.keys = np.concatenate([self.keys, np.zeros_like(self.keys)])
            self.slots = np.zeros(2 * len(self.keys), np.int32)
            self._place(np.arange(self.used))
        self.keys[self.used : self.used + len(words)] = words
        self._place(np.arange(self.used, self.used + len(words)))
        self.used += len(words)

    def find(self, keys: list[bytes]) -> int:
        words = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 4)
        mask, found = len(self.slots) - 1, 0
        at = (words[:, 0] & np.uint64(mask)).astype(np.int64)
        while len(words):
            slots = self.slots[at]
            right = (self.keys[slots - 1] == words).all(axis=1) & (slots > 0)
            found += int(right.sum())
            left = ~right & (slots > 0)
            words, at = words[left], (at[left] + 1) & mask
        return found


class NumpySorted:
    """Sorted 8-byte prefixes and a bisection; new keys wait in an unsorted buffer that is merged when it is an eighth."""

    def __init__(self, count: int) -> None:
        self.prefixes = np.empty(0, np.uint64)
        self.rows = np.empty((0, 4), np.uint64)
        self.new: list[np.ndarray] = []
        self.waiting = 0

    def add(self, keys: np.ndarray) -> None:
        self.new.append(keys.view(np.uint64))
        self.waiting += len(keys)
        if self.waiting * 8 > len(self.rows) + 8192:
            self.merge()

    def merge(self) -> None:
        self.rows = np.concatenate([self.rows, *self.new])
        order = np.argsort(self.rows[:, 0])
        self.rows, self.new, self.waiting = self.rows[order], [], 0
        self.prefixes = self.rows[:, 0].copy()

    def find(self, keys: list[bytes]) -> int:
        if self.waiting:
            self.merge()
        words = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 4)
        at = np.minimum(self.prefixes.searchsorted(words[:, 0]), len(self.rows) - 1)
        return int((self.rows[at] == words).all(axis=1).sum())


class Native:
    """kvpool._native.KeyTable."""

    def __init__(self, count: int) -> None:
        from kvpool._native import KeyTable

        self.table = KeyTable(1)
        self.out = np.empty(CHAIN, np.int32)

    def add(self, keys: np.ndarray) -> None:
        self.table.add(keys, 32, self.out)

    def find(self, keys: list[bytes]) -> int:
        return self.table.find(keys, 0, self.out)


WAYS = {"dict": Dict, "numpy probing": NumpyProbing, "numpy sorted": NumpySorted, "C table": Native}


def measure(way: str, count: int) -> dict[str, object]:
    gc.collect()
    before = resident()
    table = WAYS[way](count)
    pauses = []
    for keys in batches(count):
        start = time.thread_time()  # not the clock: other processes' turns are no pauses of ours
        table.add(keys)
        pauses.append(time.thread_time() - start)
    size = resident() - before
    near = [row.tobytes() for keys in batches(CHAIN) for row in keys]
    picked = set(np.random.default_rng(8).permutation(count // BATCH)[: CHAIN // BATCH * 8].tolist())
    far = [row.tobytes() for i, keys in enumerate(batches(count)) if i in picked for row in keys[::8]][:CHAIN]
    found = {}
    for name, keys in (("together", near), ("scattered", far)):
        times = []
        for _ in range(31):
            start = time.perf_counter()
            assert table.find(keys) == len(keys)
            times.append(time.perf_counter() - start)
        found[name] = float(np.median(times)) * 1e3
    return {
        "way": way,
        "bytes_a_key": size / count,
        "longest_insertion_ms": max(pauses) * 1e3,
        "insertion_us_a_key": sum(pauses) / count * 1e6,
        "find_8192_ms": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=10_000_000)
    parser.add_argument("--way", choices=WAYS, help="one only, in this process")
    parser.add_argument("--json", metavar="PATH", help="write the result here, - for standard output")
    args = parser.parse_args()
    count = args.keys // BATCH * BATCH
    if args.way:
        print(json.dumps(measure(args.way, count)))
        return
    rows = []
    for way in WAYS:
        call = [sys.executable, __file__, "--keys", str(count), "--way", way]
        rows.append(json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout))
        row = rows[-1]
        print(
            f"{way:14} {row['bytes_a_key']:6.1f} B/key  longest insertion {row['longest_insertion_ms']:9.2f} ms  "
            f"{row['insertion_us_a_key']:5.2f} us/key  find 8192: {row['find_8192_ms']['together']:.2f} ms together, "
            f"{row['find_8192_ms']['scattered']:.2f} ms scattered",
            file=sys.stderr,
        )
    if args.json:
        text = json.dumps({"keys": count, "ways": rows}, indent=1)
        if args.json == "-":
            print(text)
        else:
            with open(args.json, "w") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
