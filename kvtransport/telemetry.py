"""What a link knows of itself, for schedulers and people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .connection import AnyConnection
from .flow.telemetry import PathMeter, PathSummary
from .io.base import is_tunable
from .io.tcp import address_of, refused_congestion

if TYPE_CHECKING:
    from .link import Link


@dataclass(frozen=True, slots=True)
class AddressTelemetry:
    """The connections of a link between two addresses. Bytes, seconds."""

    local: str
    remote: str
    connections: int
    sent_bytes: int
    """By the connections that are there now."""
    received_bytes: int
    rtt_s: float | None


@dataclass(frozen=True, slots=True)
class LinkTelemetry:
    """What a link knows of itself. Sizes in bytes since the link was made, times in seconds, rates in bytes per second.

    What only the system can know (rates, round trips, loss) is there for TCP on Linux; elsewhere None or 0.
    """

    peer: str
    connections: int
    """Those that carry data; ``parked`` ones do not, and are closed after a while."""
    sent_bytes: int
    received_bytes: int
    unsent_bytes: int
    """Taken by the operating system and not acknowledged by the peer."""
    spilled_bytes: int
    """In transfer-cache blocks of this process now."""
    outgoing: int
    incoming: int
    rtt_s: float | None
    """The smallest of the connections' smoothed round trips now."""
    min_rtt_s: float | None = None
    """The smallest round trip seen."""
    rtt_inflation: float = 1.0
    """The first over the second: what queues on the path add."""
    goodput: float = 0.0
    """Sent in the last seconds."""
    available: float = 0.0
    """An estimate of what the path would carry: what it did deliver at best in the last seconds, so a lower bound for a
    link with little to send."""
    loss: float = 0.0
    """Share of bytes that were sent again."""
    congestion: str = "unknown"
    """The congestion controls its sockets run, joined by ``+``."""
    congestion_refused: tuple[str, ...] = ()
    """Those that would suit the path better, which this system does not allow."""
    parked: int = 0
    chunk_bytes: int = 0
    """Of transfers that do not say otherwise."""
    tuning: str = ""
    """Why it has as many connections as it has."""
    capped_at: float | None = None
    """What :meth:`~kvtransport.link.Link.cap` allows."""
    limited_by_sender_s: float = 0.0
    """Of its life: nothing was on its way."""
    limited_by_receiver_s: float = 0.0
    """The peer's windows were full."""
    limited_by_network_s: float = 0.0
    """Bytes were on their way, as many as the path and the buffers took."""
    addresses: tuple[AddressTelemetry, ...] = ()
    """By pair of local and remote address."""


class LinkMeter:
    """Reads a link; remembers what rates are made of."""

    def __init__(self, now: float) -> None:
        self._path = PathMeter(now)

    def sample(self, link: Link, now: float) -> None:
        """Take readings, so that what is asked for later covers the time since; much cheaper than :meth:`read`."""
        self._sample(link, [c for c in link.connections if not c.closed], now)

    def _sample(
        self, link: Link, live: Sequence[AnyConnection], now: float
    ) -> tuple[PathSummary, dict[AnyConnection, float]]:
        infos = [(c, info) for c in live if (info := c.stream.info()) is not None]
        unsent = sum(c.stream.unsent_bytes() for c in live)
        path = self._path.sample(now, link.sent_bytes(), infos, unsent)
        return path, {c: info.rtt_s for c, info in infos}

    def read(self, link: Link, now: float) -> LinkTelemetry:
        live = [c for c in link.connections if not c.closed]
        path, rtts = self._sample(link, live, now)
        choice = link.tuner.choice
        return LinkTelemetry(
            peer=link.peer,
            connections=sum(not c.parked for c in live),
            sent_bytes=link.sent_bytes(),
            received_bytes=link.received_bytes(),
            unsent_bytes=path.queued_bytes,
            spilled_bytes=link.spilled_bytes,
            outgoing=link.outgoing,
            incoming=link.incoming,
            rtt_s=path.rtt_s,
            min_rtt_s=path.min_rtt_s,
            rtt_inflation=path.rtt_inflation,
            goodput=path.goodput,
            available=path.available,
            loss=path.loss,
            congestion=_congestion(live),
            congestion_refused=tuple(n for n in choice.congestion[:1] if n in refused_congestion()),
            parked=sum(c.parked for c in live),
            chunk_bytes=choice.chunk_bytes,
            tuning=choice.why,
            capped_at=link.tuner.capped_at,
            limited_by_sender_s=path.limited_by_sender_s,
            limited_by_receiver_s=path.limited_by_receiver_s,
            limited_by_network_s=path.limited_by_network_s,
            addresses=_addresses(live, rtts),
        )


def _congestion(live: Sequence[AnyConnection]) -> str:
    return "+".join(sorted({c.stream.congestion() for c in live if is_tunable(c.stream)})) or "unknown"


def _addresses(live: Sequence[AnyConnection], rtts: dict[AnyConnection, float]) -> tuple[AddressTelemetry, ...]:
    pairs: dict[tuple[str, str], list[AnyConnection]] = {}
    for connection in live:
        pair = address_of(connection.stream.local), address_of(connection.stream.peer)
        pairs.setdefault(pair, []).append(connection)
    return tuple(
        AddressTelemetry(
            local=local,
            remote=remote,
            connections=len(those),
            sent_bytes=sum(c.sent_bytes for c in those),
            received_bytes=sum(c.received_bytes for c in those),
            rtt_s=min((rtts[c] for c in those if c in rtts), default=None),
        )
        for (local, remote), those in sorted(pairs.items())
    )
