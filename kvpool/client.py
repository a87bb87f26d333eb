"""A pool on the network, with the interface of the embedded one (:class:`kvpool.protocol.PoolProtocol`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import DestinationError, KVBufferError, KVError, ManifestError
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
from .messages import INLINE_BYTES, chain_to_wire, explanation_from_wire, hints_from_wire, match_from_wire
from .objects import Landing, pages_of, units
from .protocol import DEFAULT_BLOCK_TOKENS, DEFAULT_DEADLINE_S, LeaseInfo

Into = Mapping[tuple[int, int], PageList] | Callable[[Manifest], Mapping[tuple[int, int], PageList]]
"""Destinations of a get by (layer, tensor), or what makes them once the manifest is known."""


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
        self, layout: CacheLayout, block_tokens: int = DEFAULT_BLOCK_TOKENS, *, salt: bytes = b""
    ) -> Namespace:
        # The tenant in it is a local label: the pool goes by the session's.
        ns = Namespace("default", layout, block_tokens, salt)
        args = {
            "layout": layout.describe(),
            "tp_rank": layout.tp_rank,
            "block_tokens": block_tokens,
            "salt": salt,
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
    ) -> Sender:
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
        return self.link.open(manifest, deadline_s=deadline_s)

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
    ) -> Receiver:
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
        )
        try:
            await self.link.call("get", args, timeout_s=deadline_s + ANSWER_S)
        except BaseException:
            await receiver.cancel("the pool refused the get")
            raise
        return receiver

    # -- flat objects --------------------------------------------------------------------------

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return list((await self.link.call("exists", {"keys": list(keys)}))["found"])

    async def put_objects(self, objects: Mapping[bytes, Any]) -> None:
        sources = [pages_of(buffer) for buffer in objects.values()]
        args: dict[str, Any] = {
            "keys": list(objects),
            "checksums": [pages.hash(0) for pages in sources],
            "deadline_s": DEFAULT_DEADLINE_S,
        }
        if sum(pages.nbytes for pages in sources) <= INLINE_BYTES:
            await self.link.call("put_objects", {**args, "data": [pages.tobytes() for pages in sources]})
            return
        args["sizes"] = [pages.nbytes for pages in sources]
        reply = await self.link.call("put_objects", args)
        manifest = Manifest.of_objects([sum(p.nbytes for p in sources)], transfer=reply["transfer"])
        sender = self.link.open(manifest, deadline_s=DEFAULT_DEADLINE_S)
        try:
            for start, pages in units(sources):
                sender.hand_over(0, 0, start, pages)
            await sender.seal()
        except BaseException:
            await sender.cancel("the put was given up")
            raise

    async def get_objects(self, keys: Sequence[bytes]) -> list[bytes | None]:
        found = await self._get_objects(keys, Landing(None))
        return [None if pages is None else pages.tobytes() for pages in found]

    async def get_objects_into(self, keys: Sequence[bytes], into: Sequence[Any]) -> list[int | None]:
        places = [pages_of(buffer) for buffer in into]
        if len(places) != len(keys):
            raise KVBufferError(f"{len(keys)} objects were asked for, there is memory for {len(places)}")
        found = await self._get_objects(keys, Landing(places))
        return [None if pages is None else pages.nbytes for pages in found]

    async def _get_objects(self, keys: Sequence[bytes], landing: Landing) -> list[PageList | None]:
        if self._local is not None:
            return await self._read_objects(self._local, keys, landing)
        transfer = new_transfer_id()

        def grant(manifest: Manifest) -> Mapping[tuple[int, int], PageList]:
            sizes = manifest.meta.get("sizes")
            if not isinstance(sizes, list) or len(sizes) != len(keys) or not all(type(n) is int for n in sizes):
                raise ManifestError("the pool did not say the sizes of the objects that were asked for")
            if [sum(n for n in sizes if n > 0)] != [e.nbytes for e in manifest.extents]:
                raise ManifestError("the sizes of the objects do not add up to what the pool sends")
            return {(0, 0): landing.grant(sizes)}

        args = {"keys": list(keys), "transfer": transfer, "deadline_s": DEFAULT_DEADLINE_S, "inline": INLINE_BYTES}
        reply = await self.link.call("get_objects", args)
        if "data" in reply:
            bodies = iter(reply["data"])
            data = [next(bodies) if there else None for there in reply["found"]]
            landing.grant([-1 if d is None else len(d) for d in data]).copy_from(
                PageList.of(b"".join(d for d in data if d))
            )
            return await self._check_objects(keys, reply["checksums"], landing.objects())
        # The pool's OPEN may be here already: it waits for this.
        receiver = self._endpoint.expect(transfer, Expectation(grant, deadline_s=DEFAULT_DEADLINE_S), link=self.link)
        try:
            await receiver.sealed()
        finally:
            await receiver.cancel("done")
        return await self._check_objects(keys, reply["checksums"], landing.objects())

    async def _read_objects(self, local: LocalMemory, keys: Sequence[bytes], landing: Landing) -> list[PageList | None]:
        """Objects out of the pool's own memory."""
        reply = await self.link.call("locate_objects", {"keys": list(keys)})
        (place,) = unpack_places(reply["places"])
        sizes, counts = reply["sizes"], reply["counts"]
        same = local.read_pages(place, landing.grant(sizes))
        found = landing.objects()
        checksums = iter(reply["checksums"])
        kept: list[int] = []
        ends = np.cumsum(counts)
        changed = np.flatnonzero(~same)
        for i, size in enumerate(sizes):
            if size < 0:
                continue
            checksum = next(checksums)
            if len(changed) and changed.searchsorted(ends[i] - counts[i]) != changed.searchsorted(ends[i]):
                found[i] = None  # evicted or replaced meanwhile
            else:
                kept.append(checksum)
        return await self._check_objects(keys, kept, found)

    async def _check_objects(
        self, keys: Sequence[bytes], checksums: Sequence[int], found: list[PageList | None]
    ) -> list[PageList | None]:
        """Hold each object against the checksum taken at its put: bytes may also change while they rest."""
        wanted = iter(checksums)
        corrupt: list[bytes] = []
        for i, pages in enumerate(found):
            if pages is not None and pages.hash(0) != next(wanted):
                corrupt.append(keys[i])
                found[i] = None
        if corrupt:
            await self.link.call("drop_corrupt", {"keys": corrupt})
        return found

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
    connections: int = 4,
    config: EndpointConfig | None = None,
    network: Network | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
) -> PoolClient:
    """Connect to a kvpoold. Raises ConnectError, HandshakeError, InsecureBindError.

    ``network`` and ``entropy`` are the endpoint's; see :class:`kvtransport.Endpoint`.

    >>> async with await connect("127.0.0.1", 7777) as pool:  # doctest: +SKIP
    ...     print(await pool.stat())
    """
    endpoint = Endpoint(config, network=network, entropy=entropy)
    try:
        link = await endpoint.connect(host, port, connections=connections)
    except KVError:
        await endpoint.close()
        raise
    return PoolClient(endpoint, link)
