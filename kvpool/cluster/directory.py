"""The directory: members, and which node holds which segment. Soft state behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from .members import Member, Snapshot


class Directory(Protocol):
    """All methods raise :class:`kvpool.errors.DirectoryError` when the directory cannot be asked; times are seconds."""

    async def beat(self, member: Member, ttl_s: float) -> bytes:
        """Say that ``member`` is there for another ``ttl_s``; returns the directory's epoch, begun if there was none."""
        ...

    async def leave(self, member: Member) -> None:
        """Forget the member, unless another incarnation has taken its place."""
        ...

    async def snapshot(self) -> Snapshot:
        """The members that have said so within their TTLs."""
        ...

    async def announce(self, node: str, changes: Mapping[bytes, bytes | None], ttl_s: float) -> None:
        """Set (None: remove) the node's entries of segments, by their 24-byte keys; forgotten after ``ttl_s``."""
        ...

    async def look(self, keys: Sequence[bytes]) -> list[dict[str, bytes]]:
        """For every segment the entries by node, in one round trip."""
        ...

    async def close(self) -> None:
        """Give connections back. Idempotent."""
        ...


class EmbeddedDirectory:
    """The directory of one process: several pools in it, or tests. ``clock`` gives seconds, ``epoch`` names this life of it."""

    def __init__(self, clock: Callable[[], float], epoch: bytes = b"embedded") -> None:
        self._clock = clock
        self._epoch = epoch
        self._members: dict[str, tuple[float, Member]] = {}
        self._segments: dict[bytes, tuple[float, dict[str, bytes]]] = {}

    async def beat(self, member: Member, ttl_s: float) -> bytes:
        self._members[member.id] = (self._clock() + ttl_s, member)
        return self._epoch

    async def leave(self, member: Member) -> None:
        known = self._members.get(member.id)
        if known is not None and known[1].incarnation == member.incarnation:
            del self._members[member.id]

    async def snapshot(self) -> Snapshot:
        now = self._clock()
        self._members = {k: v for k, v in self._members.items() if v[0] > now}
        return Snapshot(self._epoch, tuple(m for _, m in self._members.values()))

    async def announce(self, node: str, changes: Mapping[bytes, bytes | None], ttl_s: float) -> None:
        now = self._clock()
        for key, entry in changes.items():
            _, nodes = self._segments.get(key, (0.0, {}))
            if entry is None:
                nodes.pop(node, None)
            else:
                nodes[node] = entry
            if nodes:
                self._segments[key] = (now + ttl_s, nodes)
            else:
                self._segments.pop(key, None)

    async def look(self, keys: Sequence[bytes]) -> list[dict[str, bytes]]:
        now = self._clock()
        out = []
        for key in keys:
            until, nodes = self._segments.get(key, (now, {}))
            out.append(dict(nodes) if until > now else {})
        return out

    async def close(self) -> None:
        return None

    def flush(self, epoch: bytes) -> None:
        """Lose everything and begin a new life."""
        self._members.clear()
        self._segments.clear()
        self._epoch = epoch
