"""A shared link as a fluid: transfers that grow while their prefill runs, oldest first.

The sender of this project schedules its own chunks, so the link is modelled as it would: one pipe, kept busy while
anything is ready, the oldest transfer served first. A transfer produces its bytes at a constant rate while
its prefill runs, all but the last layer, which is ready when the prefill ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DONE = 1024.0
"""Bytes below which a transfer counts as sent. Far above what rounding leaves (a second's last bit at 100 Gbps), so
that an event never finds its flow almost done, for ever."""


class Flow:
    """One transfer. ``ready`` bytes wait to be sent, more come at ``rate_in``, then ``lump`` at the end."""

    __slots__ = ("alloc", "lump", "payload", "producing", "rate_in", "ready", "wake")

    def __init__(self, ready: float, rate_in: float, lump: float, producing: bool, payload: Any) -> None:
        self.ready = ready
        self.rate_in = rate_in
        self.lump = lump
        self.producing = producing
        self.payload = payload
        self.alloc = 0.0
        self.wake = False


class FluidLink:
    """``capacity`` bytes per second, shared by its flows. The caller advances it and asks when to come back."""

    __slots__ = ("_flows", "_now", "capacity", "rtt_s", "sent", "version")

    def __init__(self, capacity: float, rtt_s: float) -> None:
        self.capacity = capacity
        self.rtt_s = rtt_s
        self.sent = 0.0
        self.version = 0
        self._flows: list[Flow] = []
        self._now = 0.0

    @property
    def waiting(self) -> float:
        """Bytes ready and not sent, as of the last advance."""
        return sum(f.ready for f in self._flows)

    @property
    def active(self) -> int:
        return len(self._flows)

    def start(self, nbytes: float, seconds: float, layers: int, payload: Any) -> Flow:
        """A transfer of ``nbytes`` produced over ``seconds`` in ``layers``; with 0 seconds all is ready at once.

        Call :meth:`advance` before and :meth:`schedule` after.
        """
        if seconds <= 0:
            flow = Flow(nbytes, 0.0, 0.0, False, payload)
        else:
            lump = nbytes / layers
            flow = Flow(0.0, (nbytes - lump) / seconds, lump, True, payload)
        self._flows.append(flow)
        return flow

    def end_production(self, flow: Flow) -> None:
        """The prefill of ``flow`` has ended: its last layer is ready."""
        flow.ready += flow.lump
        flow.rate_in = 0.0
        flow.producing = False

    def advance(self, now: float) -> list[Any]:
        """Move to ``now``; returns the payloads of the transfers whose last byte has been sent."""
        dt = now - self._now
        self._now = now
        done: list[Any] = []
        finished = False
        for flow in self._flows:
            if dt > 0.0:
                alloc = flow.alloc
                change = (flow.rate_in - alloc) * dt
                ready = flow.ready + change
                if ready < 0.0:
                    ready = 0.0
                self.sent += flow.ready + flow.rate_in * dt - ready
                flow.ready = ready
            if not flow.producing and flow.ready < DONE:
                finished = True
        if finished:
            keep = []
            for flow in self._flows:
                if not flow.producing and flow.ready < DONE:
                    done.append(flow.payload)
                else:
                    keep.append(flow)
            self._flows = keep
        return done

    def schedule(self) -> float | None:
        """Share the capacity out anew; returns when the shares change by themselves (None: never)."""
        self.version += 1
        left = self.capacity
        soonest = float("inf")
        for flow in self._flows:
            ready, rate_in = flow.ready, flow.rate_in
            if left <= 0.0:
                flow.alloc = 0.0
                continue
            if ready >= DONE:
                flow.alloc = alloc = left
                if alloc > rate_in:
                    seconds = ready / (alloc - rate_in)
                    if seconds < soonest:
                        soonest = seconds
            else:
                flow.alloc = alloc = rate_in if rate_in < left else left
            left -= alloc
        return None if soonest == float("inf") else self._now + soonest


OnDone = Callable[[float, Any], None]
