"""From counters of connections to what a link carries, could carry, and waits for. Pure: time comes with the reading."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PathInfo:
    """One connection, as the system tells it. Bytes, seconds, bytes per second; counters since it was made."""

    rtt_s: float
    min_rtt_s: float
    delivery_rate: float
    """As last measured; a lower bound of what the path carries where ``app_limited``."""
    app_limited: bool
    window_bytes: int
    notsent_bytes: int
    sent_bytes: int
    """With headers of no layer, and with what was sent again."""
    resent_bytes: int
    busy_s: float
    """There was something on its way, or waiting to be."""
    receiver_limited_s: float
    """Of that, the peer's window was full."""
    buffer_limited_s: float
    """Of that, this side's socket buffer was."""


@dataclass(frozen=True, slots=True)
class PathSummary:
    """Several connections that share a path. ``loss`` is the share of bytes sent again since the meter was made."""

    goodput: float
    available: float
    rtt_s: float | None
    min_rtt_s: float | None
    loss: float
    queued_bytes: int
    limited_by_sender_s: float
    limited_by_receiver_s: float
    limited_by_network_s: float

    @property
    def rtt_inflation(self) -> float:
        """The round trip over the smallest one seen: what queues on the path add."""
        return self.rtt_s / self.min_rtt_s if self.rtt_s and self.min_rtt_s else 1.0


class PathMeter:
    """``window_s``: goodput is that of the last so many seconds, availability the most that was seen in them.

    Availability is the sum of the connections' delivery rates, each its largest of the window: a connection without enough
    to send tells less than its path carries, never more.
    """

    def __init__(self, now: float, window_s: float = 2.0) -> None:
        self._window_s = window_s
        self._made = self._last = now
        self._sent: deque[tuple[float, int]] = deque([(now, 0)])
        self._rates: deque[tuple[float, float]] = deque()
        self._known: dict[object, PathInfo] = {}
        self._gone = [0, 0]  # sent and sent again, of connections that are no more
        self._sender_s = self._receiver_s = self._network_s = 0.0
        self._min_rtt_s: float | None = None

    def sample(self, now: float, payload_bytes: int, infos: Iterable[tuple[object, PathInfo]], queued: int) -> PathSummary:
        """``payload_bytes`` sent since the link was made, ``infos`` by each connection that lives, itself."""
        there = dict(infos)
        passed = now - self._last
        if passed > 0:
            self._account(passed, there)
        for gone in self._known.keys() - there.keys():
            self._gone[0] += self._known[gone].sent_bytes
            self._gone[1] += self._known[gone].resent_bytes
        self._known, self._last = there, now
        if payload_bytes >= self._sent[-1][1]:
            self._sent.append((now, payload_bytes))
        self._rates.append((now, sum(info.delivery_rate for info in there.values())))
        for readings in (self._sent, self._rates):
            while len(readings) > 2 and readings[1][0] <= now - self._window_s:
                readings.popleft()
        rtts = [info.rtt_s for info in there.values() if info.rtt_s > 0]
        smallest = [info.min_rtt_s for info in there.values() if info.min_rtt_s > 0]
        if smallest:
            self._min_rtt_s = min(smallest) if self._min_rtt_s is None else min(*smallest, self._min_rtt_s)
        start, first = self._sent[0]
        goodput = (payload_bytes - first) / (now - start) if now > start else 0.0
        sent = self._gone[0] + sum(info.sent_bytes for info in there.values())
        again = self._gone[1] + sum(info.resent_bytes for info in there.values())
        return PathSummary(
            goodput=goodput,
            available=max(goodput, max(rate for _, rate in self._rates)),
            rtt_s=min(rtts) if rtts else None,
            min_rtt_s=self._min_rtt_s,
            loss=again / sent if sent else 0.0,
            queued_bytes=queued,
            limited_by_sender_s=self._sender_s,
            limited_by_receiver_s=self._receiver_s,
            limited_by_network_s=self._network_s,
        )

    def _account(self, passed: float, there: dict[object, PathInfo]) -> None:
        """What the link waited for in the last ``passed`` seconds: the mean over its connections."""
        if not there:
            return
        busy, receiver = self._deltas(there, passed)
        self._receiver_s += receiver
        self._network_s += busy - receiver
        self._sender_s += passed - busy

    def _deltas(self, there: dict[object, PathInfo], passed: float) -> tuple[float, float]:
        pairs: Sequence[tuple[PathInfo, PathInfo | None]] = [(info, self._known.get(n)) for n, info in there.items()]
        busy = [min(passed, info.busy_s - (old.busy_s if old else 0.0)) for info, old in pairs]
        # A full socket buffer of this side bounds what is on its way as the peer's window does: both are windows, not loss.
        receiver = [
            min(b, info.receiver_limited_s - (old.receiver_limited_s if old else 0.0))
            for b, (info, old) in zip(busy, pairs, strict=True)
        ]
        return max(0.0, sum(busy) / len(pairs)), max(0.0, sum(receiver) / len(pairs))
