"""The pure-Python twin of ``kvpool._native``: the same names and results over a dict, some 230 bytes a key more."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ._native import Memory

__all__ = ["KeyTable", "ancestors", "cut_keys", "flags", "pack_keys", "which"]

_MOST = 64


def which(entries: dict[bytes, Any], keys: Memory, lengths: Memory, most: int, /) -> bytes:
    """A bit for each of the keys that ``entries`` has, the first in the lowest bit of the first byte.

    ``keys`` are the keys one after another, ``lengths`` the bytes of each, 1 to ``most``, as little-endian u16. ValueError when
    these do not go together.
    """
    data, sizes = bytes(keys), bytes(lengths)
    if len(sizes) % 2:
        raise ValueError(f"lengths are 2 bytes each, got {len(sizes)} bytes")
    flags: list[bool] = []
    at = 0
    for i, length in enumerate(np.frombuffer(sizes, "<u2").tolist()):
        if not 0 < length <= min(most, len(data) - at):
            raise ValueError(f"key {i} of {length} bytes at {at}: a key has 1 to {most} of the {len(data)} bytes")
        flags.append(data[at : at + length] in entries)
        at += length
    if at != len(data):
        raise ValueError(f"the lengths of {len(flags)} keys add up to {at} bytes, there are {len(data)}")
    return np.packbits(np.array(flags, np.bool_), bitorder="little").tobytes()


def pack_keys(keys: list[bytes], most: int, /) -> tuple[bytes, bytes]:
    """``keys`` one after another, and the bytes of each, 1 to ``most``, as little-endian u16: what :func:`which` takes.

    ValueError for a key that is not bytes or of another length.
    """
    if not 1 <= most <= 0xFFFF:
        raise ValueError(f"a key of {most} bytes has no length of 2 bytes")
    for i, key in enumerate(keys):
        if type(key) is not bytes:
            raise ValueError(f"key {i} is not bytes")
        if not 1 <= len(key) <= most:
            raise ValueError(f"key {i} of {len(key)} bytes: a key has 1 to {most}")
    return b"".join(keys), np.fromiter(map(len, keys), "<u2", len(keys)).tobytes()


def cut_keys(keys: Memory, lengths: Memory, /) -> list[bytes]:
    """The keys that :func:`pack_keys` packed; ValueError when ``lengths`` do not add up to ``keys``. Their lengths are not judged."""
    data, sizes = bytes(keys), bytes(lengths)
    ends = np.frombuffer(sizes[: len(sizes) & ~1], "<u2").cumsum(dtype=np.int64).tolist()
    total = ends[-1] if ends else 0
    if len(sizes) % 2 or total != len(data):
        raise ValueError(f"the lengths of {len(ends)} keys add up to {total} bytes, there are {len(data)}")
    return [data[i:j] for i, j in pairwise((0, *ends))]


def flags(bits: Memory, count: int, /) -> list[bool]:
    """The first ``count`` of ``bits``, the first in the lowest bit of the first byte; ValueError when these are more or fewer."""
    data = np.frombuffer(bits, np.uint8)  # type: ignore[arg-type]
    if count < 0 or len(data) != -(-count // 8):
        raise ValueError(f"{count} bits are not {len(data)} bytes")
    found: list[bool] = np.unpackbits(data, count=count, bitorder="little").view(bool).tolist()
    return found


def ancestors(parents: Memory, node: int, out: Memory, /) -> int:
    """The nearest ancestors of ``node`` into ``out``, as far as it has room or they go (a parent below 0); how many they are."""
    above = np.frombuffer(parents, np.int32)  # type: ignore[arg-type]
    room = _numbers(out, 0)
    done = 0
    while 0 <= node < len(above) and done < len(room) and above[node] >= 0:
        node = int(above[node])
        room[done] = node
        done += 1
    return done


class KeyTable:
    """Keys of 1 to 64 bytes to small numbers and back.

    ``keys`` are a list of bytes (``width`` 0), or one buffer of keys of ``width`` bytes each; ``out`` is a writable
    int32 buffer with room for a number per key. ``seed`` keeps whoever chooses keys from choosing collisions.
    """

    def __init__(self, seed: int) -> None:
        if not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
        self._numbers: dict[bytes, int] = {}
        self._keys: list[bytes | None] = []
        self._free: list[int] = []

    def find(self, keys: list[bytes] | Memory, width: int, out: Memory, /) -> int:
        """Numbers of the leading keys that are known, into ``out``; returns how many they are."""
        listed = _listed(keys, width)
        numbers = _numbers(out, len(listed))
        for i, key in enumerate(listed):
            number = self._numbers.get(_checked(key))
            if number is None:
                return i
            numbers[i] = number
        return len(listed)

    def add(self, keys: list[bytes] | Memory, width: int, out: Memory, /) -> None:
        """Give new keys numbers, the last removed first; raises ValueError, adding none, when one is known."""
        listed = _listed(keys, width)
        numbers = _numbers(out, len(listed))
        done = 0
        try:
            for i, key in enumerate(listed):
                if _checked(key) in self._numbers:
                    raise ValueError(f"key {i} is in the table already")
                if self._free:
                    number = self._free.pop()
                    self._keys[number] = key
                else:
                    number = len(self._keys)
                    self._keys.append(key)
                self._numbers[key] = number
                numbers[i] = number
                done += 1
        except (TypeError, ValueError):
            for number in numbers[:done][::-1].tolist():
                self.remove(number)
            raise

    def remove(self, number: int, /) -> None:
        """Forget a key; its number is given out again. Raises ValueError when there is none."""
        del self._numbers[self.key(number)]
        self._keys[number] = None
        self._free.append(number)

    def remove_all(self, numbers: Memory, /) -> None:
        """Forget keys by an int32 buffer of numbers, in order; ValueError at the first number that has none."""
        for number in np.frombuffer(numbers, np.int32).tolist():  # type: ignore[arg-type]
            self.remove(number)

    def absent(self, keys: list[bytes] | Memory, width: int, /) -> int:
        """How many of the leading keys are not known."""
        listed = _listed(keys, width)
        return next((i for i, key in enumerate(listed) if _checked(key) in self._numbers), len(listed))

    def key(self, number: int, /) -> bytes:
        """The key with this number; raises ValueError when there is none."""
        key = self._keys[number] if 0 <= number < len(self._keys) else None
        if key is None:
            raise ValueError(f"no key has the number {number}")
        return key

    def keys(self, numbers: Memory, /) -> list[bytes]:
        """The keys with the numbers of an int32 buffer; ValueError when one of them has none."""
        return [self.key(number) for number in np.frombuffer(numbers, np.int32).tolist()]  # type: ignore[arg-type]

    def get(self, key: bytes, /) -> int:
        """Its number, or -1."""
        return self._numbers.get(_checked(key), -1)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def high(self) -> int:
        """All numbers given out so far are below this."""
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes: keys and integers included."""
        each = 33 + 32 + 28 if self._numbers else 0
        return sys.getsizeof(self._numbers) + sys.getsizeof(self._keys) + len(self._numbers) * each


def _checked(key: bytes) -> bytes:
    if not isinstance(key, bytes):
        raise TypeError(f"a key is bytes, got {type(key).__name__}")
    if not 0 < len(key) <= _MOST:
        raise ValueError(f"a key has 1 to {_MOST} bytes, got {len(key)}")
    return key


def _listed(keys: list[bytes] | Memory, width: int) -> list[bytes]:
    if width == 0:
        if not isinstance(keys, list):
            raise TypeError("keys are a list of bytes, or a buffer with a width")
        return keys
    if not 0 < width <= _MOST:
        raise ValueError(f"a key has 1 to {_MOST} bytes, got {width}")
    data = bytes(memoryview(keys).cast("B"))  # type: ignore[arg-type]
    if len(data) % width:
        raise ValueError(f"{len(data)} bytes are no whole keys of {width}")
    return [data[at : at + width] for at in range(0, len(data), width)]


def _numbers(out: Memory, count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    view = memoryview(out)  # type: ignore[arg-type]
    if view.readonly:
        raise BufferError("the buffer is read-only")
    if view.nbytes % 4 or view.nbytes // 4 < count:
        raise ValueError(f"{count} numbers of 4 bytes do not fit a buffer of {view.nbytes} bytes")
    return np.frombuffer(view, np.int32) if view.nbytes else np.empty(0, np.int32)
