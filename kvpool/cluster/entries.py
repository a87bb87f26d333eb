"""What the directory holds of one segment on one node.

An entry is the node's own field in the segment's record, so that nobody else writes it: 8 bytes of the incarnation, a u32
generation (it grows with every change), then 8 bytes a block::

    u8   units that are resident, a bit each
    u8   block within the segment
    u16  0: the block itself; else an off-grid checkpoint so many tokens after the block's end
    u32  the first four bytes of its key

Four bytes tell branches of one segment apart; the owner, which has whole keys, decides.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADER = struct.Struct("<8sI")
RECORD = np.dtype([("units", "u1"), ("block", "u1"), ("offset", "<u2"), ("key", "<u4")])
MAX_RECORDS = 4_096
"""Branches of one segment on one node together; what is beyond is not announced."""
INCARNATION_BYTES = 8
_WHERE = struct.Struct("<BHI")
_SIZE = RECORD.itemsize

Keys = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Entry:
    """A decoded entry; ``records`` has the fields of RECORD."""

    incarnation: bytes
    generation: int
    records: NDArray[Any]


def decode(data: bytes) -> Entry | None:
    """The entry in ``data``; None when it is none (nobody promises that the directory holds only ours)."""
    body = len(data) - HEADER.size
    if body < 0 or body % _SIZE or body // _SIZE > MAX_RECORDS:
        return None
    incarnation, generation = HEADER.unpack_from(data)
    return Entry(incarnation, generation, np.frombuffer(data, RECORD, offset=HEADER.size))


def short(keys: Sequence[bytes]) -> Keys:
    """The first four bytes of each key, as records hold them."""
    return np.frombuffer(b"".join(k[:4].ljust(4, b"\0") for k in keys), "<u4")


def resident(entry: Entry, keys: Keys, units: int) -> NDArray[np.bool_]:
    """bool (units, blocks): which of a segment's blocks, given by their :func:`short` keys, the entry holds."""
    out = np.zeros((units, len(keys)), dtype=np.bool_)
    records = entry.records
    records = records[(records["offset"] == 0) & (records["block"] < len(keys))]
    at = records["block"].astype(np.intp)
    right = keys[at] == records["key"]
    at, bits = at[right], records["units"][right]
    for unit in range(units):
        out[unit, at[(bits >> unit) & 1 == 1]] = True
    return out


@dataclass(frozen=True, slots=True)
class TailRecord:
    """An off-grid checkpoint ``offset`` tokens after the end of ``block``; ``key`` as of :func:`short`."""

    block: int
    offset: int
    key: int
    units: tuple[bool, ...]


def tails(entry: Entry, units: int) -> list[TailRecord]:
    """The off-grid checkpoints of an entry."""
    return [
        TailRecord(
            int(r["block"]), int(r["offset"]), int(r["key"]), tuple(bool(r["units"] >> u & 1) for u in range(units))
        )
        for r in entry.records[entry.records["offset"] != 0]
    ]


class Draft:
    """An entry as its owner keeps it: the records as they travel, few enough to be searched one by one."""

    __slots__ = ("_records", "generation", "told")

    def __init__(self, *, told: bool = False) -> None:
        self.generation = 0
        self.told = told
        """Whether somebody may have seen an entry of this segment, and has to hear when it holds nothing any more."""
        self._records = bytearray()

    def __bool__(self) -> bool:
        return bool(self._records)

    def set(self, block: int, offset: int, key: bytes, unit: int, there: bool) -> None:
        """Unit ``unit`` of a record came or went."""
        where = _WHERE.pack(block, offset, int.from_bytes(key[:4].ljust(4, b"\0"), "little"))
        records = self._records
        at = records.find(where)
        while at >= 0 and at % _SIZE != 1:
            at = records.find(where, at + 1)
        self.generation += 1
        if at < 0:
            if there and len(records) < MAX_RECORDS * _SIZE:
                records += bytes([1 << unit]) + where
            return
        bits = records[at - 1] | 1 << unit if there else records[at - 1] & ~(1 << unit)
        if bits:
            records[at - 1] = bits
        else:
            del records[at - 1 : at - 1 + _SIZE]

    def encode(self, incarnation: bytes) -> bytes:
        """The entry to announce."""
        return HEADER.pack(incarnation[:INCARNATION_BYTES], self.generation & 0xFFFFFFFF) + bytes(self._records)
