"""What tests and plots read: JSON lines about ended transfers, and hashes of the cache bytes at both ends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kvtransport.buffers import Hasher, PageList
from kvtransport.errors import ConfigError, KVError
from kvtransport.transfer import TransferStats

from .geometry import Geometry

Role = Literal["producer", "consumer"]


class DebugLog:
    """Appends to ``<kind>-<role>-<rank>-<pid>.jsonl``; one line is one write, so that a killed process leaves whole lines."""

    def __init__(self, directory: Path, rank: int, *, hashes: bool) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"debug_dir {directory}: {error.strerror}") from None
        self._directory = directory
        self._rank = rank
        self.hashes = hashes

    def write(self, kind: str, role: Role, record: Mapping[str, Any]) -> None:
        path = self._directory / f"{kind}-{role}-{self._rank}-{os.getpid()}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def hash(
        self,
        role: Role,
        request: str,
        transfer: bytes,
        geometry: Geometry,
        digests: Mapping[tuple[int, int], tuple[int, int]],
    ) -> None:
        """``digests``: (wire layer, tensor) -> (xxh3_64, bytes)."""
        for (layer, tensor), (digest, nbytes) in sorted(digests.items()):
            self.write(
                "hashes",
                role,
                {
                    "transfer": transfer.hex(),
                    "request": request,
                    "layer": geometry.layers[layer].name,
                    "tensor": geometry.layers[layer].tensors[tensor].name,
                    "hash": f"{digest:016x}",
                    "bytes": nbytes,
                },
            )


class RunningHashes:
    """Hashes of what is handed over, piece by piece, as if it were one buffer per (layer, tensor)."""

    def __init__(self) -> None:
        self._hashers: dict[tuple[int, int], tuple[Hasher, int]] = {}

    def add(self, layer: int, tensor: int, pages: PageList) -> None:
        hasher, nbytes = self._hashers.get((layer, tensor)) or (Hasher(), 0)
        hasher.update_pages(pages.base, pages.pieces, 0, pages.nbytes)
        self._hashers[layer, tensor] = (hasher, nbytes + pages.nbytes)

    def digests(self) -> dict[tuple[int, int], tuple[int, int]]:
        return {slot: (hasher.intdigest(), nbytes) for slot, (hasher, nbytes) in self._hashers.items()}


def end_of(error: KVError | None, *, cancelled: bool) -> str:
    """ "sealed", "aborted" (this side gave it up) or "failed"."""
    if error is None:
        return "sealed"
    return "aborted" if cancelled else "failed"


def transfer_record(
    request: str,
    transfer: bytes,
    boundary: int,
    stats: TransferStats,
    error: KVError | None,
    geometry: Geometry,
    *,
    cancelled: bool,
    ended_s: float,
    computed_s: Mapping[int, float] | None = None,
    steps: list[dict[str, float]] | None = None,
) -> dict[str, Any]:
    """One ended transfer. Times are the event loop's clock (CLOCK_MONOTONIC seconds on Linux), the same for all processes of a machine."""
    computed_s = computed_s or {}
    layers = []
    for i, layer in enumerate(geometry.layers):
        times = stats.layers.get(i)
        layers.append(
            {
                "layer": layer.name,
                "kind": str(layer.rule.kind),
                "computed_s": computed_s.get(i),
                "ready_s": times and times.ready_s,
                "first_byte_s": times and times.first_byte_s,
                "applied_s": times and times.applied_s,
                "acked_s": times and times.acked_s,
            }
        )
    return {
        "transfer": transfer.hex(),
        "request": request,
        "tokens": boundary,
        "end": end_of(error, cancelled=cancelled),
        "error": None if error is None else f"{error.code}: {error.message}",
        "bytes": stats.moved_bytes,
        "total_bytes": stats.total_bytes,
        "chunks": stats.chunks,
        "resent_bytes": stats.resent_bytes,
        "duplicate_bytes": stats.duplicate_bytes,
        "corrupt_chunks": stats.corrupt_chunks,
        "spilled_bytes": stats.spilled_bytes,
        "credit_stall_s": stats.credit_stall_s,
        "opened_s": stats.opened_s,
        "sealed_s": stats.sealed_s,
        "ended_s": ended_s,
        "steps": steps or [],
        "layers": layers,
    }
