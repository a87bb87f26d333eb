"""A get in progress: pinned sources of one restorable length, maybe read behind a put that is still arriving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvtransport.buffers import PageList
from kvtransport.errors import DeadlineError, KVError
from kvtransport.layout import Extent
from kvtransport.manifest import Manifest

from .index import Selection
from .keys import Namespace
from .placement import Slot, overlaps
from .put import Progress, Put, PutState

if TYPE_CHECKING:
    from .core import PoolCore
    from .rooms import Room


class Get:
    """Made by :meth:`kvpool.core.PoolCore.plan_get`.

    ``sources`` match the extents of :meth:`manifest`; a range may be read once it is in :meth:`ready_ranges` or was
    announced to a subscriber. ``on_sealed`` is called when the followed put is committed (``sealed`` says whether that
    has happened already), ``on_failed`` when it failed or the deadline passed: the reader then stops whatever still reads the
    sources and calls :meth:`close`. Until then they stay; without an ``on_failed`` they are given up at once.
    """

    def __init__(
        self,
        core: PoolCore,
        room: Room,
        *,
        boundary: int,
        start: int,
        deadline: float,
        extents: Mapping[Slot, Extent],
        sources: Mapping[Slot, PageList],
        pinned: Selection,
        put: Put | None,
    ) -> None:
        self.ns: Namespace = room.tree.ns
        self.boundary = boundary
        self.start = start
        self.deadline = deadline
        self.extents = extents
        self.sources = sources
        self.on_sealed: Callable[[], None] | None = None
        self.on_failed: Callable[[KVError], None] | None = None
        self.error: KVError | None = None
        self.closed = False
        self._core = core
        self._room = room
        self._pinned = pinned
        self._put = put
        self._sealed = put is None or put.state is PutState.COMMITTED
        self._shared: dict[Slot, list[tuple[int, int, int]]] = {}
        self._listeners: list[Progress] = []
        self._unsubscribe: Callable[[], None] | None = None
        if put is not None:
            self._shared = {slot: overlaps(put.extents[slot], e) for slot, e in extents.items() if slot in put.extents}
            put.attach(self)
            if not self._sealed:
                self._unsubscribe = put.subscribe(self._put_progress)

    def manifest(self, transfer: bytes) -> Manifest:
        """What the reader receives under the 16-byte id ``transfer``: states at the boundary only."""
        return Manifest.of_layout(
            self.ns.layout, self.boundary, transfer=transfer, start=self.start, block_tokens=self.ns.block_tokens
        )

    @property
    def sealed(self) -> bool:
        """Whether everything is there and committed."""
        return self._sealed

    def ready_ranges(self) -> list[tuple[int, int, int, int]]:
        """(layer, tensor, start, stop) in the extents' byte spaces of what can be read now."""
        ready: list[tuple[int, int, int, int]] = []
        for slot, extent in self.extents.items():
            if self._sealed or self._put is None:
                ready.append((*slot, 0, extent.nbytes))
                continue
            at = 0
            for low, high, mine in [*self._shared.get(slot, ()), (0, 0, extent.nbytes)]:
                if at < mine:  # from the index: between what the put brings
                    ready.append((*slot, at, mine))
                at = mine + high - low
            for low, high in self._put.verified(slot):
                ready += [(*slot, a, b) for a, b in self._translate(slot, low, high)]
        return ready

    def subscribe(self, listener: Progress) -> Callable[[], None]:
        """Call ``listener`` (layer, tensor, start, stop) for everything that becomes readable from now on."""
        self._listeners.append(listener)

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unsubscribe

    def close(self) -> None:
        """Give the sources up. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._listeners.clear()
        if self._unsubscribe is not None:
            self._unsubscribe()
        self._room.tree.unpin(self._pinned)
        self._pinned = []
        self.sources = {}
        if self._put is not None:
            self._put.detach(self)
        self._core._closed(self)

    def expire(self) -> None:
        """The deadline has passed (called by :meth:`kvpool.core.PoolCore.expire`)."""
        if not self.closed and self.error is None:
            self.fail(DeadlineError(f"the get of {self.boundary} tokens was not finished before its deadline"))

    def fail(self, error: KVError) -> None:
        """End with ``error`` (the followed put failed, or the deadline passed)."""
        if self.closed or self.error is not None:
            return
        self.error = error
        self._listeners.clear()
        if self.on_failed is None:
            self.close()
        else:
            self.on_failed(error)

    # -- following -------------------------------------------------------------------------------

    def _translate(self, slot: Slot, start: int, stop: int) -> list[tuple[int, int]]:
        """Bytes of the put's extent as ranges of this get's."""
        found = []
        for low, high, mine in self._shared.get(slot, ()):
            first, last = max(start, low), min(stop, high)
            if first < last:
                found.append((mine + first - low, mine + last - low))
        return found

    def _put_progress(self, layer: int, tensor: int, start: int, stop: int) -> None:
        for low, high in self._translate((layer, tensor), start, stop):
            for listener in tuple(self._listeners):
                listener(layer, tensor, low, high)

    def _put_sealed(self) -> None:
        if self.error is None and not self.closed:
            self._sealed = True
            if self.on_sealed is not None:
                self.on_sealed()
