"""Faults put into the code on purpose: each must be caught, or the simulation proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from kvtransport import connection as connection_module
from kvtransport import dialling as dialling_module
from kvtransport.engine.incoming import PythonIncoming
from kvtransport.sender import Sender
from kvtransport.wire import frames
from kvtransport.wire.ranges import RangeSet
from kvtransport.wire.state import ConnectionMachine


def _claim_not_voided(self: PythonIncoming, slot: tuple[int, int], start: int, stop: int, attempt: int) -> bool:
    rivals = [
        (connection, claim)
        for connection, claim in self._claims.items()
        if (claim.layer, claim.tensor) == slot and claim.start < stop and start < claim.stop
    ]
    if any(claim.attempt >= attempt for _, claim in rivals):
        return False
    for connection, _ in rivals:
        del self._claims[connection]  # and the older receive goes on writing
    return True


async def _no_settling(self: Sender) -> None:
    """Cancel returns although copies are still reading the source."""


class _Unfenced(ConnectionMachine):
    """Whoever answers is taken for the peer of before."""

    def __init__(self, role: Any, **kwargs: Any) -> None:
        kwargs["peer_incarnation"] = None
        super().__init__(role, **kwargs)


def _unpack_unchecked(buf: Any, limits: Any = frames.DEFAULT_LIMITS) -> Any:
    """The header as it came: its check is made to fit."""
    fixed = bytearray(buf)
    check = frames._xxh3(bytes(fixed[: frames._COVERED]))
    theirs = frames._U64.unpack_from(fixed, frames._CHECK_AT)[0]
    frames._U64.pack_into(fixed, frames._CHECK_AT, check)
    header = frames.unpack_header(bytes(fixed), limits)
    return header if check == theirs else header._replace(check=theirs)


def _merged_wrongly(self: RangeSet, start: int, stop: int) -> int:
    """The last two ranges become one, and the gap between them is forgotten."""
    new = _ADD(self, start, stop)
    if len(self._starts) > 1:
        del self._starts[-1], self._stops[-2]
    return new


_ADD = RangeSet.add

_OPEN = Sender._send_open


def _released_when_opened(self: Sender, via: Any = None) -> None:
    """What travels in an OPEN is given back as soon as that was said, though it may have to be said again."""
    _OPEN(self, via)
    for unit in self._in_open or ():
        unit.release()


MUTATIONS: dict[str, Callable[[], Any]] = {
    "claim not voided on takeover": lambda: mock.patch.object(PythonIncoming, "_win", _claim_not_voided),
    "cancel not waiting": lambda: mock.patch.object(Sender, "_settle", _no_settling),
    "incarnation unchecked": lambda: mock.patch.object(dialling_module, "ConnectionMachine", _Unfenced),
    "header check skipped": lambda: mock.patch.object(connection_module, "unpack_header", _unpack_unchecked),
    "whole transfer given back too early": lambda: mock.patch.object(Sender, "_send_open", _released_when_opened),
    "range merged wrongly": lambda: mock.patch.object(RangeSet, "add", _merged_wrongly),
}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Run with the fault ``name`` in the code; None: with the code as it is."""
    if name is None:
        yield
        return
    with MUTATIONS[name]():
        yield
