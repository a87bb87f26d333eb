"""A pool on the network, with the interface of the embedded one (:class:`kvpool.protocol.PoolProtocol`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import KVError, ManifestError
from kvtransport.layout import CacheLayout
from kvtransport.link import Link
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation, Receiver
from kvtransport.sender import Sender

from .admission import CheckpointHints
from .keys import KeyChain, Namespace
from .match import Explanation, Match
from .messages import chain_to_wire, explanation_from_wire, hints_from_wire, match_from_wire
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
        self.link = link

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the link and everything in progress on it. Idempotent."""
        await self._endpoint.close()

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
        return match_from_wire(await self.link.call("match", self._about(ns, chain, limit=limit)))

    async def explain(self, ns: Namespace, chain: KeyChain) -> Explanation:
        return explanation_from_wire(await self.link.call("explain", self._about(ns, chain)))

    async def checkpoint_hints(self, ns: Namespace, chain: KeyChain, insists: Iterable[int] = ()) -> CheckpointHints:
        args = self._about(ns, chain, insists=sorted({*insists}))
        return hints_from_wire(await self.link.call("checkpoint_hints", args))

    async def lease(self, ns: Namespace, chain: KeyChain, length: int, seconds: float) -> LeaseInfo:
        reply = await self.link.call("lease", self._about(ns, chain, length=length, seconds=seconds))
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
            ns, chain, boundary=boundary, start=start, request=request, transfer=transfer, deadline_s=deadline_s
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
        sources = {key: PageList.of(buffer) for key, buffer in objects.items()}
        args = {
            "keys": list(sources),
            "sizes": [pages.nbytes for pages in sources.values()],
            "checksums": [pages.hash(0) for pages in sources.values()],
            "deadline_s": DEFAULT_DEADLINE_S,
        }
        reply = await self.link.call("put_objects", args)
        manifest = Manifest.of_objects((p.nbytes for p in sources.values()), transfer=reply["transfer"])
        sender = self.link.open(manifest, deadline_s=DEFAULT_DEADLINE_S)
        try:
            for extent, pages in zip(manifest.extents, sources.values(), strict=True):
                sender.ready(extent.layer, extent.tensor, pages)
            await sender.seal()
        except BaseException:
            await sender.cancel("the put was given up")
            raise

    async def get_objects(self, keys: Sequence[bytes]) -> list[bytes | None]:
        transfer = new_transfer_id()
        buffers: list[bytearray] = []

        def grant(manifest: Manifest) -> Mapping[tuple[int, int], PageList]:
            buffers.extend(bytearray(extent.nbytes) for extent in manifest.extents)
            return {(e.layer, e.tensor): PageList.of(b) for e, b in zip(manifest.extents, buffers, strict=True)}

        receiver = self._endpoint.expect(transfer, Expectation(grant, deadline_s=DEFAULT_DEADLINE_S), link=self.link)
        try:
            args = {"keys": list(keys), "transfer": transfer, "deadline_s": DEFAULT_DEADLINE_S}
            reply = await self.link.call("get_objects", args)
            if not any(reply["found"]):
                return [None] * len(keys)
            await receiver.sealed()
        finally:
            await receiver.cancel("done")
        return await self._check_objects(keys, reply, buffers)

    async def _check_objects(
        self, keys: Sequence[bytes], reply: Mapping[str, Any], buffers: list[bytearray]
    ) -> list[bytes | None]:
        """Hold each object against the checksum taken at its put: bytes may also change while they rest."""
        arrived = iter(zip(buffers, reply["checksums"], strict=True))
        found: list[bytes | None] = []
        corrupt: list[bytes] = []
        for key, there in zip(keys, reply["found"], strict=True):
            data: bytes | None = None
            if there:
                buffer, checksum = next(arrived)
                if PageList.of(buffer).hash(0) == checksum:
                    data = bytes(buffer)
                else:
                    corrupt.append(key)
            found.append(data)
        if corrupt:
            await self.link.call("drop_corrupt", {"keys": corrupt})
        return found

    # -- the whole -----------------------------------------------------------------------------

    async def stat(self) -> dict[str, Any]:
        return await self.link.call("stat")

    async def clear(self) -> int:
        return int((await self.link.call("clear"))["entries"])

    # -- inside --------------------------------------------------------------------------------

    def _about(self, ns: Namespace, chain: KeyChain | None, **more: Any) -> dict[str, Any]:
        return {"ns": self._names.get(ns.id, ns.id), "chain": chain_to_wire(chain), **more}


async def connect(host: str, port: int, *, connections: int = 4, config: EndpointConfig | None = None) -> PoolClient:
    """Connect to a kvpoold. Raises ConnectError, HandshakeError, InsecureBindError.

    >>> async with await connect("127.0.0.1", 7777) as pool:  # doctest: +SKIP
    ...     print(await pool.stat())
    """
    endpoint = Endpoint(config)
    try:
        link = await endpoint.connect(host, port, connections=connections)
    except KVError:
        await endpoint.close()
        raise
    return PoolClient(endpoint, link)
