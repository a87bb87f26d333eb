"""How many connections a link has, which congestion control they run, how large chunks and windows are. Pure.

Whoever applies it brings readings at its own pace and with its own clock (:mod:`kvtransport.tuner`). The rules, and what they
rest on (docs/performance.md has the figures):

- A path of under 1 ms without loss is a loopback or a datacentre's: few connections, and congestion control that takes loss
  for congestion (BBR halves loopback). Anything longer, or lossy, gets BBR and several connections.
- More connections are tried while the link is busy, twice as many at a time, and kept where goodput pays for them. What did not
  pay is given back, and not tried again for a while.
- Goodput that falls while the link stays busy means that the path has changed: fresh connections are tried at once. (BBR believes
  its smallest round trip for 10 seconds, the kernel for five minutes; a fresh connection measures its own.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .telemetry import PathInfo

SHORT_RTT_S = 0.001
"""Below this a path is a local one."""
MOST_SHORT_RTT_S = 0.01
"""A path that was local stays so up to here: queues of this side's own making, and starved processors, lengthen it too."""
LOSSY = 1e-3
"""Share of bytes sent again, of :data:`TELLING_BYTES` at least, from which on a short path counts as lossy. (A loopback that
starves for processor time sends one in ten thousand again, for nothing.)"""
TELLING_BYTES = 64e6
LONG_PATH = ("bbr",)
"""Congestion controls for long or lossy paths, best first."""
SHORT_PATH = ("cubic", "reno")
FEW = 2
"""Connections of a short path; one per I/O thread where there are more."""
START = 8
"""Of a longer one; 16 are slower to start at 10 ms."""
LONG_RTT_S = 0.02
"""From here on :data:`MOST` to begin with: at 30 ms buffers and loss bound each of them."""
UNKNOWN = 4
"""Where nothing is known of the path (no TCP)."""
MOST = 16
BUSY = 0.6
"""Share of the time in which there was something to send, below which goodput tells about the sender, not about the path."""
PAYS = 1.05
"""Twice the connections must bring so many times the goodput."""
QUEUED = 1.25
"""A round trip of so many times the least one: a queue stands on the path, which is full. More connections would only queue."""
FELL = 0.85
"""Goodput below this share of what the same connections carried means another path."""
SETTLE_S = 0.3
LOOK_S = 1.0
"""Goodput is judged over so long, after what was changed has settled."""
FALL_S = 0.5
REST_S = 20.0
"""After a trial that did not pay; each further one waits twice as long, up to :data:`MOST_REST_S`."""
MOST_REST_S = 320.0
CALM_S = 10.0
"""What loss and the least round trip are taken over."""
CHUNK_BYTES = 1 << 20
"""On a local path, where a link keeps a few MiB unacknowledged."""
CHUNK_S = 0.01
"""On a longer one a chunk should take a connection about so long: at the end of a transfer somebody waits for the last ones."""
LEAST_CHUNK, MOST_CHUNK = 512 << 10, 4 << 20
UNSENT_CHUNKS = 0.25
"""Of a chunk, on a longer path, in a connection's socket and not sent yet: an urgent transfer waits for it three times."""
WINDOW_BYTES = 64 << 20
MOST_WINDOW = 1 << 30


@dataclass(frozen=True, slots=True)
class Reading:
    """A link between two moments. Seconds, bytes per second; shares are of that time, the mean over its connections."""

    seconds: float
    goodput: float
    connections: int
    busy: float
    peer_limited: float
    """The peer's window was full."""
    buffer_limited: float
    """This side's socket buffer was."""
    rtt_s: float
    """The least of the connections' smoothed round trips."""
    min_rtt_s: float
    """The least that was measured."""
    loss: float


@dataclass(frozen=True, slots=True)
class Choice:
    """``congestion``: names, best first. ``fresh``: connections that were there before had better be replaced."""

    connections: int
    congestion: tuple[str, ...]
    chunk_bytes: int
    unsent_bytes: int | None
    """In a socket and not sent yet, at most about so much; None: as the system has it."""
    fresh: bool
    why: str


def congestion_for(rtt_s: float | None, loss: float = 0.0) -> tuple[str, ...]:
    """Congestion controls for such a path, best first; none: whatever the system has."""
    if rtt_s is None or rtt_s <= 0:
        return ()
    return SHORT_PATH if rtt_s < SHORT_RTT_S and loss < LOSSY else LONG_PATH


def connections_for(rtt_s: float | None, io_threads: int, most: int = MOST) -> int:
    """Connections to begin with on a path of which only the round trip (seconds) is known."""
    if rtt_s is None or rtt_s <= 0:
        return min(UNKNOWN, most)
    if rtt_s < SHORT_RTT_S:
        return min(max(FEW, io_threads), most)
    return min(START if rtt_s < LONG_RTT_S else MOST, most)


def chunk_for(goodput: float, connections: int, *, local: bool = False) -> int:
    """Bytes of a chunk, a multiple of 64 KiB, for a link that carries ``goodput`` (bytes/s; 0: not known)."""
    if local:
        return CHUNK_BYTES
    wanted = goodput / max(1, connections) * CHUNK_S
    return int(min(MOST_CHUNK, max(LEAST_CHUNK, wanted))) >> 16 << 16


def window_for(goodput: float, rtt_s: float | None) -> int:
    """Credit in bytes for a transfer: twice what is on its way on the path, but never less than 64 MiB (nor more than 1 GiB).

    Granted memory is the caller's already, so that credit costs nothing: it only bounds what may arrive unasked.
    """
    return int(min(MOST_WINDOW, max(WINDOW_BYTES, 2.0 * goodput * (rtt_s or 0.0))))


class Readings:
    """Makes :class:`Reading` from counters of connections."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._delivered = 0
        self._known: dict[object, PathInfo] = {}

    def take(self, now: float, delivered_bytes: int, infos: Iterable[tuple[object, PathInfo]]) -> Reading | None:
        """``delivered_bytes``: acknowledged since the link was made. None: too early, or nothing can be compared."""
        there: Mapping[object, PathInfo] = dict(infos)
        passed = now - self._at
        both = [(info, self._known[key]) for key, info in there.items() if key in self._known]
        delivered = delivered_bytes - self._delivered
        self._at, self._delivered, self._known = now, delivered_bytes, dict(there)
        if passed <= 0 or not both:
            return None
        sent = sum(new.sent_bytes - old.sent_bytes for new, old in both)
        again = sum(new.resent_bytes - old.resent_bytes for new, old in both)

        def share(of: Callable[[PathInfo], float]) -> float:
            return sum(min(passed, of(new) - of(old)) for new, old in both) / passed / len(both)

        rtts = [new.rtt_s for new, old in both if new.sent_bytes > old.sent_bytes] or [new.rtt_s for new, _ in both]
        return Reading(
            seconds=passed,
            goodput=max(0, delivered) / passed,
            connections=len(there),
            busy=share(lambda info: info.busy_s),
            peer_limited=share(lambda info: info.receiver_limited_s),
            buffer_limited=share(lambda info: info.buffer_limited_s),
            rtt_s=min(rtts),
            min_rtt_s=min(new.min_rtt_s for new, _ in both),
            loss=again / sent if sent > 0 else 0.0,
        )


class Tuning:
    """Decides for one link; :meth:`judge` is told what happened since the last call and says what to have now.

    ``fixed``: connections and congestion control that somebody asked for; they are not touched.
    """

    def __init__(
        self,
        rtt_s: float | None,
        *,
        io_threads: int = 1,
        most: int = MOST,
        fixed_connections: int | None = None,
    ) -> None:
        self._threads = max(1, io_threads)
        self._most = most
        self._fixed = fixed_connections
        self._lately: deque[tuple[float, float, float, float]] = deque()
        """(when, round trip, bytes, those of them that were sent again)"""
        self._now = 0.0
        self._lossy = False
        self._short = rtt_s is not None and 0 < rtt_s < SHORT_RTT_S
        self._was_local = self._short
        self._rtt_s = rtt_s
        self._wanted = fixed_connections or connections_for(rtt_s, self._threads, most)
        self._before: tuple[int, float] | None = None
        """While more are tried: how many there were, and what they carried."""
        self._looked_s = self._looked_bytes = 0.0
        self._settle_s = SETTLE_S
        self._fell_s = 0.0
        self._best = 0.0
        """What the connections of now carried at best in a look."""
        self._goodput = 0.0
        self._rest_s = 0.0
        self._rest_next = REST_S
        self._fresh = False
        self._why = "start"

    @property
    def rtt_s(self) -> float | None:
        """The least of the last ten seconds' smoothed round trips."""
        return self._rtt_s

    def limit(self, most: int) -> None:
        """The peer takes no more connections than this."""
        self._most = max(1, most)
        self._wanted = min(self._wanted, self._most)

    def choice(self) -> Choice:
        if self._rtt_s is None:
            congestion: tuple[str, ...] = ()
        else:
            congestion = SHORT_PATH if self._local() else LONG_PATH
        local = self._rtt_s is None or self._local()
        chunk_bytes = chunk_for(self._goodput, self._wanted, local=local)
        return Choice(
            connections=self._wanted,
            congestion=congestion,
            chunk_bytes=chunk_bytes,
            unsent_bytes=None if local else int(chunk_bytes * UNSENT_CHUNKS),
            fresh=self._fresh,
            why=self._why,
        )

    def judge(self, reading: Reading) -> Choice:
        self._now += reading.seconds
        self._fresh = False
        self._note_path(reading)
        # A connection without anything to send, or a peer that does not take more, tells nothing about the path.
        telling = reading.busy >= BUSY and reading.peer_limited < 0.5
        if not telling:
            self._start_over()
            return self.choice()
        self._goodput = reading.goodput if self._goodput == 0 else 0.7 * self._goodput + 0.3 * reading.goodput
        if self._fixed is None and not self._local():
            self._climb(reading)
        return self.choice()

    # -- inside --------------------------------------------------------------------------------

    def _local(self) -> bool:
        return self._short and not self._lossy

    def _note_path(self, reading: Reading) -> None:
        was = self._was_local
        nbytes = reading.goodput * reading.seconds
        self._lately.append((self._now, reading.rtt_s, nbytes, nbytes * reading.loss))
        while self._lately[0][0] < self._now - CALM_S:
            self._lately.popleft()
        self._rtt_s = min(rtt for _, rtt, _, _ in self._lately)
        sent, again = sum(n for _, _, n, _ in self._lately), sum(n for _, _, _, n in self._lately)
        self._lossy = sent >= TELLING_BYTES and again >= LOSSY * sent
        # Hysteresis: queues of this side's own making lengthen a short path too.
        self._short = self._rtt_s < (MOST_SHORT_RTT_S if self._short else SHORT_RTT_S)
        self._was_local = self._local()
        if self._fixed is None and was != self._was_local:
            rtt = self._rtt_s if self._short == self._was_local else SHORT_RTT_S
            self._have(connections_for(rtt, self._threads, self._most), "the path is another kind of path")
            self._before = None
            self._rest_next = REST_S

    def _climb(self, reading: Reading) -> None:
        if self._settle_s > 0:
            self._settle_s -= reading.seconds
            return
        if self._best and reading.goodput < FELL * self._best and self._before is None:
            self._fell_s += reading.seconds
            if self._fell_s >= FALL_S:
                self._fell()
            return
        self._fell_s = 0.0
        self._rest_s -= reading.seconds
        self._looked_s += reading.seconds
        self._looked_bytes += reading.seconds * reading.goodput
        if self._looked_s < max(LOOK_S, 10 * reading.rtt_s):
            return
        carried = self._looked_bytes / self._looked_s
        self._looked_s = self._looked_bytes = 0.0
        if self._before is not None:
            count, then = self._before
            self._before = None
            if carried < PAYS * then:
                self._have(count, f"{self._wanted} connections did not carry more than {count}")
                self._best = then
                self._rest_s, self._rest_next = self._rest_next, min(MOST_REST_S, 2 * self._rest_next)
                return
            self._why = f"{self._wanted} connections carry more than {count}"
        self._best = carried
        queued = reading.rtt_s > QUEUED * reading.min_rtt_s
        if self._rest_s <= 0 and self._wanted < self._most and not queued:
            self._try_more(carried, "are more worth it?")

    def _fell(self) -> None:
        """Another path: what was learnt of the old one does not count, and its connections may believe in it."""
        self._rest_s, self._rest_next = 0.0, REST_S
        self._fresh = True
        self._have(self._wanted, "goodput fell: the path has changed")

    def _try_more(self, carried: float, why: str) -> None:
        count = self._wanted
        self._have(min(self._most, 2 * count), why)
        self._before = (count, carried)

    def _have(self, connections: int, why: str) -> None:
        self._wanted, self._why = connections, why
        self._best = 0.0
        self._settle_s = max(SETTLE_S, 10 * (self._rtt_s or 0.0))
        self._looked_s = self._looked_bytes = self._fell_s = 0.0

    def _start_over(self) -> None:
        """Looks are at times without a pause; what is being tried waits for one."""
        self._looked_s = self._looked_bytes = self._fell_s = 0.0
