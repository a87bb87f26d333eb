"""Whether coding a chunk pays on this link now. Pure: rates are told, the choice is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

MARGIN = 1.1
"""Coding must promise so many times the goodput: it costs processor time that others want too."""
WEIGHT = 0.2
"""Of a new observation in the running means."""
PROBE_EVERY = 256
"""Chunks between two looks at a codec that was not worth it."""


LOOK_EVERY_S = 0.1
LOOKS = 10
"""The most of so many is what the path carries."""
IDLE_SHARE = 0.1
"""A link that had nothing on its way for more of the time says nothing of its path."""


class BusyRate:
    """What a path delivers while something always waits for it, bytes per second; None until that was seen.

    Not the delivery rate of a connection (TCP_INFO): that is of bursts, where the queue is not at this end of the path.
    """

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._rates: deque[float] = deque(maxlen=LOOKS)
        self._last: tuple[float, int, int, float] | None = None

    def wants(self, now: float) -> bool:
        return self._last is None or now - self._last[0] >= LOOK_EVERY_S

    def look(self, now: float, sent_bytes: int, unsent_bytes: int, idle_s: float) -> None:
        """Counters of the link: sent, sent and not delivered yet, and for how long nothing was on its way."""
        last, self._last = self._last, (now, sent_bytes - unsent_bytes, unsent_bytes, idle_s)
        if last is None or not last[2] or not unsent_bytes or now - last[0] > 10 * LOOK_EVERY_S:
            return
        passed = now - last[0]
        if passed <= 0 or idle_s - last[3] > IDLE_SHARE * passed:
            return
        self._rates.append(max(0, sent_bytes - unsent_bytes - last[1]) / passed)
        self.bytes_per_s = max(self._rates) or None


@dataclass(slots=True)
class _Seen:
    bytes_per_s: float
    ratio: float


def out_of_reach(codecs: tuple[int, ...], speeds: Mapping[int, float], link_bytes_per_s: float) -> bool:
    """Whether every codec is known to be too slow for the link, so that none would be tried on data not seen before."""
    least = link_bytes_per_s * MARGIN
    return all(speeds.get(codec, least) < least for codec in codecs)


class CodingChoice:
    """Chooses among ``codecs`` (any keys, the plain way not among them) for each chunk.

    Coding runs beside sending, so a coded chunk takes the longer of coding it and sending what is left of it: it pays
    where the codec is faster than the link and the bytes become fewer. What is not known is tried once, and again now
    and then: data changes. ``speeds``, bytes per second by codec, are shared by the choices for other data of the same link:
    what is too slow for the link is not even tried.
    """

    def __init__(self, codecs: tuple[int, ...], speeds: dict[int, float] | None = None) -> None:
        self._codecs = codecs
        self._speeds = {} if speeds is None else speeds
        self._seen: dict[int, _Seen] = {}
        self._chunks = 0

    def observe(self, codec: int, raw: int, coded: int, seconds: float) -> None:
        """``raw`` bytes became ``coded`` (as many where coding gave up) in ``seconds`` of one processor."""
        rate, ratio = raw / max(seconds, 1e-9), raw / coded
        self._speeds[codec] = rate + (1 - WEIGHT) * (self._speeds.get(codec, rate) - rate)
        seen = self._seen.get(codec)
        if seen is None:
            self._seen[codec] = _Seen(rate, ratio)
            return
        seen.bytes_per_s += WEIGHT * (rate - seen.bytes_per_s)
        seen.ratio += WEIGHT * (ratio - seen.ratio)

    def choose(self, link_bytes_per_s: float | None) -> int | None:
        """The codec for the next chunk, None: send it as it is. ``link_bytes_per_s``: payload rate, None: not known yet."""
        self._chunks += 1
        if link_bytes_per_s is None:
            return None
        best, best_rate = None, link_bytes_per_s * MARGIN
        for codec in self._codecs:
            seen = self._seen.get(codec)
            if seen is None:
                if self._speeds.get(codec, best_rate) < best_rate:
                    continue
                return codec
            rate = self.goodput(codec, link_bytes_per_s)
            if rate > best_rate:
                best, best_rate = codec, rate
        if best is None and self._seen and self._chunks % PROBE_EVERY == 0 and self._codecs:
            return self._codecs[self._chunks // PROBE_EVERY % len(self._codecs)]
        return best

    def goodput(self, codec: int, link_bytes_per_s: float) -> float:
        """Raw bytes per second that ``codec`` promises on such a link, by what was seen of it."""
        seen = self._seen[codec]
        return min(seen.bytes_per_s, seen.ratio * link_bytes_per_s)
