"""Who is in the pool: records of nodes, and a view of them that survives the loss of the directory.

The directory is soft state. When it is unreachable, or younger than two TTLs after it lost everything, the last view is
*frozen*: nobody leaves it, newcomers and newer incarnations still enter, and nothing that moves data may start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

import msgspec

from kvtransport.errors import ProtocolError

MAX_RECORD_BYTES = 16_384


class State(StrEnum):
    """Of a member, as it says itself."""

    UP = "up"
    DRAINING = "draining"
    """Serves what it has, takes nothing new."""


class Member(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """One node's record. ``addresses`` are "HOST:PORT" in order of preference, sizes are bytes."""

    id: str
    incarnation: bytes
    cluster: str
    addresses: tuple[str, ...]
    capacity: int
    used: int = 0
    state: State = State.UP
    load: int = 0
    """Bytes of reads in progress there."""

    def __post_init__(self) -> None:
        if not 0 < len(self.id.encode()) <= 128 or len(self.incarnation) != 16 or not self.addresses:
            raise ProtocolError("a member has an id of 1 to 128 bytes, an incarnation of 16 bytes and an address")
        if min(self.capacity, self.used, self.load) < 0:
            raise ProtocolError(f"member {self.id!r}: sizes must not be negative")

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Member:
        """Inverse of :meth:`encode`. Raises ProtocolError."""
        if len(data) > MAX_RECORD_BYTES:
            raise ProtocolError(f"a member's record has at most {MAX_RECORD_BYTES} bytes, got {len(data)}")
        try:
            return msgspec.msgpack.decode(data, type=Member)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"not a member's record: {error}") from error


class Snapshot(msgspec.Struct, frozen=True):
    """What the directory says of the members at one time. ``epoch`` names the directory's life: losing everything starts a new one."""

    epoch: bytes | None
    members: tuple[Member, ...]


class Roster:
    """The view of the members that everybody works with. ``ttl_s``: seconds after which a silent member is gone."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.members: Mapping[str, Member] = {}
        self._epoch: bytes | None = None
        self._young_until = float("-inf")
        self._old_from = float("-inf")
        """Until then the directory may have lost everything moments before it was first asked, for all that is known here."""
        self._unreachable = False
        self._updated = float("-inf")

    def update(self, asked: float, snapshot: Snapshot, *, heard: float | None = None) -> None:
        """The directory answered, at ``heard`` (default: at once) what it was asked for at ``asked``.

        The view is as old as its question, and what has happened to the directory as young as the answer: a process that was stopped in
        between may read of a loss that came long after it had asked.
        """
        now = asked if heard is None else heard
        if self._unreachable and now - self._updated > self.ttl_s / 2:
            # It may have been out of the nodes' reach as well: their records have expired, and they are about to say again that they are there.
            self._young_until = max(self._young_until, now + 2 * self.ttl_s)
        self._unreachable = False
        self._updated = asked
        if snapshot.epoch != self._epoch or snapshot.epoch is None:
            # The first epoch one ever sees is no loss: there is nothing to hold on to.
            if self._epoch is not None or (snapshot.epoch is None and self.members):
                self._young_until = now + 2 * self.ttl_s
            elif snapshot.epoch is not None:
                self._old_from = now + 2 * self.ttl_s
            self._epoch = snapshot.epoch or self._epoch
        seen = {m.id: m for m in snapshot.members}
        self.members = {**self.members, **seen} if self.frozen(now) else seen

    def failed(self) -> None:
        """The directory did not answer."""
        self._unreachable = True

    def frozen(self, now: float) -> bool:
        """Whether the view is an old one: peers are asked directly, and no repair or rebalance starts."""
        return self._unreachable or now < self._young_until

    def steady(self, now: float) -> bool:
        """Whether data may be moved by this view: it is not frozen, no older than the TTL, and the directory has been known for two TTLs.

        A process that was stopped for a while (SIGSTOP, a suspended machine) wakes with a view that nothing has marked as frozen; one
        that has just joined cannot tell a directory that lost everything from a small cluster.
        """
        return not self.frozen(now) and now - self._updated <= self.ttl_s and now >= self._old_from

    def writable(self) -> list[Member]:
        """Members that take new data."""
        return [m for m in self.members.values() if m.state is State.UP]

    def incarnations(self) -> dict[str, bytes]:
        return {m.id: m.incarnation for m in self.members.values()}


class Pulse:
    """A node's own side: when to say that it is there, and when it may have been forgotten.

    A node that was silent for longer than the TTL (frozen, partitioned), or sees another epoch, announces everything again.
    """

    def __init__(self, ttl_s: float, *, beats: int = 3) -> None:
        self.ttl_s = ttl_s
        self.interval_s = ttl_s / beats
        self._last: float | None = None
        self._epoch: bytes | None = None

    def beaten(self, now: float, epoch: bytes) -> bool:
        """A beat was confirmed; True when all entries must be announced again."""
        last, self._last = self._last, now
        before, self._epoch = self._epoch, epoch
        return last is None or now - last > self.ttl_s or before != epoch


def by_cluster(members: Iterable[Member]) -> dict[str, list[Member]]:
    """Members by cluster, both sorted by name."""
    out: dict[str, list[Member]] = {}
    for member in sorted(members, key=lambda m: (m.cluster, m.id)):
        out.setdefault(member.cluster, []).append(member)
    return out
