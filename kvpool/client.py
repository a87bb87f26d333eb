"""A pool on the network, with the interface of the embedded one (:class:`kvpool.protocol.PoolProtocol`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import AddressError, DestinationError, KVBufferError, KVError, ManifestError, ProtocolError
from kvtransport.io.base import Network
from kvtransport.layout import CacheLayout
from kvtransport.link import Link
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation, Receiver
from kvtransport.sender import Sender

from .admission import CheckpointHints
from .errors import PoolError
from .keys import KeyChain, Namespace
from .local import LocalMemory, unpack_places
from .match import Explanation, Match
from .messages import (
    INLINE_BYTES,
    bits_from_wire,
    chain_to_wire,
    explanation_from_wire,
    hints_from_wire,
    keys_to_wire,
    match_from_wire,
    numbers_from_wire,
)
from .objects import (
    Landing,
    Sizes,
    are_right,
    checksums_of,
    copied,
    joined,
    packed,
    pages_of,
    sizes_of,
    units,
    unpacked,
)
from .protocol import DEFAULT_BLOCK_TOKENS, DEFAULT_DEADLINE_S, LeaseInfo
from .security import DEFAULT_TENANT

Into = Mapping[tuple[int, int], PageList] | Callable[[Manifest], Mapping[tuple[int, int], PageList]]
"""Destinations of a get by (layer, tensor), or what makes them once the manifest is known."""


HASH_FIRST_BYTES = 1 << 20
"""Of more than this the checksums follow the objects, which are then under way while they are taken."""
ANSWER_S = 1.0
"""Beyond a deadline, for the pool's own answer that it has passed."""


class PoolClient:
    """Made by :func:`connect`. Belongs to one event loop; use as an async context manager."""

    def __init__(self, endpoint: Endpoint, link: Link) -> None:
        self._endpoint = endpoint
        self._names: dict[bytes, bytes] = {}
        self._local: LocalMemory | None = None
        self.link = link

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the link and everything in progress on it. Idempotent."""
        if self._local is not None:
            self._local.close()
            self._local = None
        await self._endpoint.close()

    def map_memory(self, path: str | Path) -> None:
        """Read what is asked for in the pool's own memory from now on, at its ``local_socket``, where that works.

        Objects then come by :meth:`get_objects` and :meth:`get_objects_into` as before; prefixes by :meth:`read_local`.
        Raises ConnectError or ArenaError.
        """
        self._local = LocalMemory(path)

    async def read_local(
        self, ns: Namespace, chain: KeyChain, *, boundary: int, into: Mapping[tuple[int, int], PageList], start: int = 0
    ) -> bool:
        """:meth:`get` out of the pool's own memory, into page lists by (layer, tensor).

        False when some of it was evicted meanwhile: what is in ``into`` is then nothing, and :meth:`get` may say more. Raises MissError
        when it is not there in the first place, PoolError without :meth:`map_memory`.
        """
        if self._local is None:
            raise PoolError("the pool's memory is not mapped: call map_memory first")
        args = self._about(ns, chain, keys=not boundary % ns.block_tokens, boundary=boundary, start=start)
        reply = await self.link.call("locate", args)
        places = unpack_places(reply["places"])
        slots = [(int(layer), int(tensor)) for layer, tensor in reply["slots"]]
        if set(slots) != set(into) or len(slots) != len(places):
            raise DestinationError(f"there are {len(slots)} tensors to read, and destinations for {len(into)}")
        return all(self._local.read(place, into[slot]) for slot, place in zip(slots, places, strict=True))

    # -- lookups -------------------------------------------------------------------------------

    async def namespace(
        self,
        layout: CacheLayout,
        block_tokens: int = DEFAULT_BLOCK_TOKENS,
        *,
        salt: bytes = b"",
        tenant: str | None = None,
    ) -> Namespace:
        """As of :class:`kvpool.protocol.PoolProtocol`. ``tenant``: whose it is, when that must be known: by a node that copies other
        tenants' blocks (the pool refuses anybody else for whom it does not take the session), or to be told of a mistake.
        """
        # Without one the tenant in it is a local label: the pool goes by the session's.
        ns = Namespace(tenant or DEFAULT_TENANT, layout, block_tokens, salt)
        args = {
            "layout": layout.describe(),
            "tp_rank": layout.tp_rank,
            "block_tokens": block_tokens,
            "salt": salt,
            **({} if tenant is None else {"tenant": tenant}),
        }
        self._names[ns.id] = (await self.link.call("namespace", args))["ns"]
        return ns

    async def match(self, ns: Namespace, chain: KeyChain, limit: int | None = None) -> Match:
        args = self._about(ns, chain, keys=True, limit=limit, asks_again=not chain.opaque)
        reply = await self.link.call("match", args)
        if reply.get("again"):
            reply = await self.link.call("match", self._about(ns, chain, limit=limit))
        return match_from_wire(reply)

    async def explain(self, ns: Namespace, chain: KeyChain) -> Explanation:
        return explanation_from_wire(await self.link.call("explain", self._about(ns, chain)))

    async def checkpoint_hints(self, ns: Namespace, chain: KeyChain, insists: Iterable[int] = ()) -> CheckpointHints:
        args = self._about(ns, chain, insists=sorted({*insists}))
        return hints_from_wire(await self.link.call("checkpoint_hints", args))

    async def lease(self, ns: Namespace, chain: KeyChain, length: int, seconds: float) -> LeaseInfo:
        reply = await self.link.call(
            "lease", self._about(ns, chain, keys=not length % ns.block_tokens, length=length, seconds=seconds)
        )
        return LeaseInfo(int(reply["lease"]), length, seconds)

    async def release(self, lease_id: int) -> None:
        await self.link.call("release", {"lease": lease_id})

    # -- prefixes ------------------------------------------------------------------------------

    async def put(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        start: int = 0,
        checkpoints: Iterable[int] = (),
        request: bytes | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
        priority: int = 0,
    ) -> Sender:
        """As of :class:`kvpool.protocol.PoolProtocol`; chunks of a higher ``priority`` go first on this link."""
        points = sorted({*checkpoints})
        args = self._about(
            ns, chain, boundary=boundary, start=start, checkpoints=points, request=request, deadline_s=deadline_s
        )
        reply = await self.link.call("put", args, timeout_s=deadline_s + ANSWER_S)
        manifest = Manifest.of_layout(
            ns.layout,
            boundary,
            transfer=reply["transfer"],
            start=start,
            checkpoints=points,
            block_tokens=ns.block_tokens,
        )
        return self.link.open(manifest, deadline_s=deadline_s, priority=priority)

    async def get(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        into: Into,
        start: int = 0,
        request: bytes | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
        priority: int = 0,
        bytes_per_s: float | None = None,
    ) -> Receiver:
        """As of :class:`kvpool.protocol.PoolProtocol`; the pool sends it no faster than ``bytes_per_s``."""
        transfer = new_transfer_id()

        def grant(manifest: Manifest) -> Mapping[tuple[int, int], PageList]:
            if manifest.boundary != boundary or manifest.start != start or manifest.checkpoints:
                raise ManifestError("the pool opened another range of tokens than was asked for")
            return into(manifest) if callable(into) else into

        wanted = Expectation(grant, layout=ns.layout, block_tokens=ns.block_tokens, deadline_s=deadline_s)
        receiver = self._endpoint.expect(transfer, wanted, link=self.link)
        args = self._about(
            ns,
            chain,
            keys=not boundary % ns.block_tokens,
            boundary=boundary,
            start=start,
            request=request,
            transfer=transfer,
            deadline_s=deadline_s,
            **({"priority": priority} if priority else {}),
            **({} if bytes_per_s is None else {"bytes_per_s": bytes_per_s}),
        )
        try:
            await self.link.call("get", args, timeout_s=deadline_s + ANSWER_S)
        except BaseException:
            await receiver.cancel("the pool refused the get")
            raise
        return receiver

    # -- flat objects --------------------------------------------------------------------------

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        reply = await self.link.call("exists", keys_to_wire(keys))
        return bits_from_wire(reply.get("found"), len(keys))

    async def put_objects(self, objects: Mapping[bytes, Any]) -> None:
        sources = [pages_of(buffer) for buffer in objects.values()]
        args = {**keys_to_wire(list(objects)), "deadline_s": DEFAULT_DEADLINE_S}
        if sum([pages.nbytes for pages in sources]) <= INLINE_BYTES:
            await self.link.call("put_objects", {**args, **packed(sources)})
            return
        sizes = sizes_of(sources)
        whole, total = joined(sources), int(sizes.sum())
        args["sizes"] = sizes.tobytes()
        if total <= HASH_FIRST_BYTES:
            args["checksums"] = (await checksums_of(sources, sizes, whole)).tobytes()
        reply = await self.link.call("put_objects", args)
        manifest = Manifest.of_objects([total], transfer=reply["transfer"])
        sender = self.link.open(manifest, deadline_s=DEFAULT_DEADLINE_S, held=True)
        try:
            for start, pages in units(sources, whole):
                sender.hand_over(0, 0, start, pages)
            if "checksums" not in args:  # they follow while the objects are on their way
                sums = (await checksums_of(sources, sizes, whole)).tobytes()
                await self.link.call("checksums", {"transfer": reply["transfer"], "checksums": sums})
            await sender.seal()
        except BaseException:
            await sender.cancel("the put was given up")
            raise

    async def get_objects(self, keys: Sequence[bytes]) -> list[bytes | None]:
        landing = Landing(None)
        got = await self._get_objects(keys, landing)
        if isinstance(got, list):
            return got
        objects = zip(landing.objects(), got.tolist(), strict=True)
        return [None if pages is None or size < 0 else pages.tobytes() for pages, size in objects]

    async def get_objects_into(self, keys: Sequence[bytes], into: Sequence[Any]) -> list[int | None]:
        places = [pages_of(buffer) for buffer in into]
        if len(places) != len(keys):
            raise KVBufferError(f"{len(keys)} objects were asked for, there is memory for {len(places)}")
        landing = Landing(places)
        got = await self._get_objects(keys, landing)
        if isinstance(got, list):
            return copied(got, places)
        landing.deliver()
        return [None if size < 0 else size for size in got.tolist()]

    async def _get_objects(self, keys: Sequence[bytes], landing: Landing) -> Sizes | list[bytes | None]:
        """Have them in ``landing``; bytes of each, -1 where there is none. Or themselves, when they came with the answer."""
        if self._local is not None:
            return await self._read_objects(self._local, keys, landing)
        transfer = new_transfer_id()
        args = {**keys_to_wire(keys), "transfer": transfer, "deadline_s": DEFAULT_DEADLINE_S, "inline": INLINE_BYTES}
        reply = await self.link.call("get_objects", args)
        there = bits_from_wire(reply.get("found"), len(keys))
        count = sum(there)
        sizes = numbers_from_wire(reply, "sizes", count)
        if count and int(sizes.min()) < 0:
            raise ProtocolError("an object of fewer than no bytes")
        checksums = numbers_from_wire(reply, "checksums", count).view(np.uint64)
        if "data" in reply:
            objects, wrong = unpacked(reply["data"], there, sizes.tolist(), checksums.tolist())
            if wrong:
                await self.link.call("drop_corrupt", keys_to_wire([keys[i] for i in wrong]))
            return objects
        found = np.array(there, np.bool_)
        places = np.full(len(keys), -1, np.int64)
        places[found] = sizes
        whole = landing.grant(places.tolist())
        await self._receive_objects(transfer, whole)
        await self._drop_wrong(keys, places, np.flatnonzero(found)[~await are_right(whole, sizes, checksums)])
        return places

    async def _receive_objects(self, transfer: bytes, whole: PageList) -> None:
        """Objects one after another as one extent into ``whole``."""

        def grant(manifest: Manifest) -> Mapping[tuple[int, int], PageList]:
            if [whole.nbytes] != [e.nbytes for e in manifest.extents]:
                raise ManifestError("the sizes of the objects do not add up to what the pool sends")
            return {(0, 0): whole}

        # The pool's OPEN may be here already: it waits for this.
        receiver = self._endpoint.expect(transfer, Expectation(grant, deadline_s=DEFAULT_DEADLINE_S), link=self.link)
        try:
            await receiver.sealed()
        finally:
            await receiver.cancel("done")

    async def _read_objects(self, local: LocalMemory, keys: Sequence[bytes], landing: Landing) -> Sizes:
        """Objects out of the pool's own memory."""
        reply = await self.link.call("locate_objects", keys_to_wire(keys))
        (place,) = unpack_places(reply["places"])
        sizes = numbers_from_wire(reply, "sizes", len(keys))
        ends = numbers_from_wire(reply, "counts", len(keys)).cumsum()
        there = sizes >= 0
        whole = landing.grant(sizes.tolist())
        # Evicted or replaced meanwhile: a page of it changed.
        changed = np.flatnonzero(~local.read_pages(place, whole))
        begins = np.concatenate([[0], ends[:-1]])
        lost = there & (changed.searchsorted(begins) != changed.searchsorted(ends))
        sums = numbers_from_wire(reply, "checksums", int(there.sum())).view(np.uint64)
        wrong = np.zeros(len(keys), np.bool_)
        wrong[there] = ~await are_right(whole, sizes[there], sums)
        found = np.where(lost, -1, sizes)
        await self._drop_wrong(keys, found, np.flatnonzero(wrong & ~lost))
        return found

    async def _drop_wrong(self, keys: Sequence[bytes], sizes: Sizes, wrong: NDArray[np.intp]) -> None:
        """Those that no longer have the checksum taken at their put are not there (-1): bytes may also change while they rest."""
        sizes[wrong] = -1
        if len(wrong):
            await self.link.call("drop_corrupt", keys_to_wire([keys[i] for i in wrong.tolist()]))

    # -- the whole -----------------------------------------------------------------------------

    async def stat(self) -> dict[str, Any]:
        return await self.link.call("stat")

    async def clear(self) -> int:
        return int((await self.link.call("clear"))["entries"])

    # -- inside --------------------------------------------------------------------------------

    def _about(self, ns: Namespace, chain: KeyChain | None, *, keys: bool = False, **more: Any) -> dict[str, Any]:
        return {
            "ns": self._names.get(ns.id, ns.id),
            "chain": chain_to_wire(chain, keys=keys),
            **more,
        }


async def connect(
    host: str,
    port: int,
    *,
    connections: int | None = None,
    config: EndpointConfig | None = None,
    network: Network | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
    on_unreachable: Callable[[Link, AddressError], None] | None = None,
) -> PoolClient:
    """Connect to a kvpoold. Raises ConnectError, HandshakeError, InsecureBindError.

    ``network``, ``entropy`` and ``on_unreachable`` are the endpoint's; see :class:`kvtransport.Endpoint`.

    >>> async with await connect("127.0.0.1", 7777) as pool:  # doctest: +SKIP
    ...     print(await pool.stat())
    """
    endpoint = Endpoint(config, network=network, entropy=entropy)
    endpoint.on_unreachable = on_unreachable
    try:
        link = await endpoint.connect(host, port, connections=connections)
    except KVError:
        await endpoint.close()
        raise
    return PoolClient(endpoint, link)
