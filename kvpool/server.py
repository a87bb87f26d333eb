"""The pool behind an endpoint: verbs in, transfers in and out.

A put is a transfer the daemon *receives* straight into the blocks it allocated, a get is one it *sends* straight from
them; a get of a request whose put is still arriving relays every range as soon as it is verified.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import numpy as np

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint
from kvtransport.errors import IntegrityError, KVError, ManifestError, RefusedError
from kvtransport.layout import CacheLayout
from kvtransport.link import Link
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation
from kvtransport.sender import Sender

from .below import Below
from .core import PoolCore
from .errors import MissError
from .flat import FlatGet, FlatPut
from .get import Get
from .keys import KeyChain, Namespace
from .local import Located, pack_places
from .messages import INLINE_BYTES, Args, bits_to_wire, chain_steps, match_to_wire
from .metrics import Metrics
from .put import Put
from .security import tenant_of
from .steps import Background, Steps, run_in_turns
from .waiting import Waiting

TICK_S = 0.1
"""How often deadlines are looked at."""

Verb = Callable[["Session", Args], Awaitable[dict[str, Any]]]
T = TypeVar("T")


class Session:
    """What one link has opened here. The tenant is the session's, never the request's."""

    def __init__(self, link: Link, tenant: str) -> None:
        self.link = link
        self.tenant = tenant
        self.namespaces: dict[bytes, Namespace] = {}
        self.leases: set[int] = set()
        self.puts: dict[bytes, FlatPut] = {}
        """Objects on their way, by transfer."""

    def speaks_for(self, tenant: str | None) -> str:
        """The tenant of a namespace that names one: the session's own, or any for a node of the cluster. Raises RefusedError."""
        if tenant is None or tenant == self.tenant:
            return self.tenant
        if self.link.identity is None or not self.link.identity.node:
            raise RefusedError(
                f"this session is tenant {self.tenant!r} and cannot speak for {tenant!r}: connect as that tenant; only nodes of "
                "the cluster, by a certificate with a URI kvpool://node/NAME, copy what belongs to others"
            )
        return tenant


class PoolServer:
    """Serves ``core`` on ``endpoint``. Belongs to the endpoint's event loop.

    ``explain_tenants``: explanations may say that another tenant has the same tokens.
    """

    def __init__(
        self, endpoint: Endpoint, core: PoolCore, *, window_bytes: int = 64 << 20, explain_tenants: bool = False
    ) -> None:
        self.core = core
        self._explain_tenants = explain_tenants
        self._endpoint = endpoint
        self._window = window_bytes
        self._sessions: dict[Link, Session] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waiting = Waiting(core)
        self._puts = 0
        self._wire: Counter[str] = Counter()
        self._below = Below()
        self._draining = False
        self._loop = asyncio.get_running_loop()
        self.metrics: Metrics | None = None
        """Told of calls and transfers when set."""
        self.on_read: Callable[[Namespace, KeyChain, int], None] | None = None
        """Told of (namespace, chain, boundary) of every get when set."""
        self.sending_bytes = 0
        """Of gets in progress."""
        self.on_tick: Callable[[], object] | None = None
        """Called every TICK_S seconds when set."""
        self.only_tenant: str | None = None
        """Whom alone it serves, when set: one whose clients may map the memory."""
        verbs: dict[str, Verb] = {
            "namespace": self._namespace,
            "match": self._match,
            "explain": self._explain,
            "checkpoint_hints": self._checkpoint_hints,
            "put": self._put,
            "get": self._get,
            "lease": self._lease,
            "release": self._release,
            "exists": self._exists,
            "put_objects": self._put_objects,
            "checksums": self._checksums,
            "get_objects": self._get_objects,
            "drop_corrupt": self._drop_corrupt,
            "locate": self._locate,
            "locate_objects": self._locate_objects,
            "stat": self._stat,
            "clear": self._clear,
        }
        for name, verb in verbs.items():
            endpoint.handlers[name] = self._handler(name, verb)
        self._learning = Background(core.policy.work)
        core.on_work = self._learning.start
        self._ticker = self._spawn(self._tick())

    # -- life ----------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Puts and gets in progress."""
        return self._puts + len(self._tasks) - (0 if self._ticker.done() else 1)

    async def drain(self, grace_s: float) -> bool:
        """Take no new puts and gets and wait for those in progress; whether all finished within ``grace_s``."""
        self._draining = True
        deadline = asyncio.get_running_loop().time() + grace_s
        # Puts and gets end in many places; shutting down may poll.
        while self.active and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return not self.active

    async def close(self) -> None:
        """Stop at once; what is in progress fails."""
        self._draining = True
        self._learning.stop()
        self.core.on_work = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.core.expire()
            if self.on_tick is not None:
                self.on_tick()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _handler(self, name: str, verb: Verb) -> Callable[[Link, dict[str, Any]], Awaitable[dict[str, Any]]]:
        async def handle(link: Link, args: dict[str, Any]) -> dict[str, Any]:
            if self.metrics is None:
                return await verb(self._session(link), Args(name, args))
            start, outcome = time.perf_counter(), "cancelled"
            try:
                answer = await verb(self._session(link), Args(name, args))
                outcome = "ok"
                return answer
            except KVError as error:
                outcome = type(error).__name__
                raise
            finally:
                self.metrics.called(name, time.perf_counter() - start, outcome)

        return handle

    def _moved(self, kind: str, since: float, error: KVError | None) -> None:
        if self.metrics is not None:
            self.metrics.moved(kind, time.perf_counter() - since, "ok" if error is None else type(error).__name__)

    def _session(self, link: Link) -> Session:
        session = self._sessions.get(link)
        if session is None:
            tenant = tenant_of(link.identity)
            if self.only_tenant is not None and tenant != self.only_tenant:
                raise RefusedError(
                    "this pool lends its memory to local clients of one tenant and serves no other: use another pool"
                )
            session = self._sessions[link] = Session(link, tenant)
            link.on_end(lambda: self._leave(session))
        return session

    def _leave(self, session: Session) -> None:
        """A client is gone: its leases with it (its transfers end with the link)."""
        self._sessions.pop(session.link, None)
        for lease in session.leases:
            try:
                self.core.release(lease)
            except KVError:
                continue  # its deadline came first

    def _check_open(self) -> None:
        if self._draining:
            raise RefusedError("this pool node is shutting down", retryable=True)

    # -- lookups -------------------------------------------------------------------------------

    async def _namespace(self, session: Session, args: Args) -> dict[str, Any]:
        tenant = session.speaks_for(args.get("tenant", (str, type(None)), None))
        layout = CacheLayout.from_description(args.get("layout", dict), tp_rank=args.integer("tp_rank", 0))
        ns = self.core.open_namespace(tenant, layout, args.integer("block_tokens"), args.get("salt", bytes, b""))
        session.namespaces[ns.id] = ns
        return {"ns": ns.id}

    async def _match(self, session: Session, args: Args) -> dict[str, Any]:
        ns = args.namespace(session.namespaces)
        chain = await run_in_turns(chain_steps(ns, args.get("chain", dict)))
        assert chain is not None
        if args.get("asks_again", bool, False) and self.core.has_off_grid(ns, chain):
            return {"again": True}  # with the tokens: keys off the grid are made of them
        return match_to_wire(self.core.match(ns, chain, args.get("limit", (int, type(None)), None)))

    async def _explain(self, session: Session, args: Args) -> dict[str, Any]:
        ns = args.namespace(session.namespaces)
        chain = await run_in_turns(chain_steps(ns, args.get("chain", dict)))
        assert chain is not None
        limit = args.get("limit", (int, type(None)), None)
        return self.core.explain(ns, chain, limit, operator=self._explain_tenants).as_dict()

    async def _checkpoint_hints(self, session: Session, args: Args) -> dict[str, Any]:
        ns = args.namespace(session.namespaces)
        chain = await run_in_turns(chain_steps(ns, args.get("chain", dict)))
        assert chain is not None
        return self.core.checkpoint_hints(ns, chain, args.integers("insists")).as_dict()

    async def _exists(self, session: Session, args: Args) -> dict[str, Any]:
        return {"found": self.core.exists_packed(session.tenant, args.get("keys", bytes), args.get("lengths", bytes))}

    async def _lease(self, session: Session, args: Args) -> dict[str, Any]:
        ns = args.namespace(session.namespaces)
        chain = await run_in_turns(chain_steps(ns, args.get("chain", dict)))
        assert chain is not None
        lease = self.core.lease(ns, chain, args.integer("length"), args.seconds("seconds"))
        session.leases.add(lease.id)
        return {"lease": lease.id}

    async def _release(self, session: Session, args: Args) -> dict[str, Any]:
        number = args.integer("lease")
        if number in session.leases:
            session.leases.discard(number)
            self.core.release(number)
        return {}

    async def _stat(self, session: Session, args: Args) -> dict[str, Any]:
        return self.stat()

    def stat(self) -> dict[str, Any]:
        """:meth:`kvpool.core.PoolCore.stat`, and what is on the wire."""
        return {
            **self.core.stat(),
            "links": len(self._endpoint.links),
            "transfers": self.active,
            "wire": {**self._wire, "yielded_pieces": self._below.yielded},
        }

    async def _clear(self, session: Session, args: Args) -> dict[str, Any]:
        return {"entries": self.core.clear(tenant=session.tenant)}

    # -- puts ----------------------------------------------------------------------------------

    async def _put(self, session: Session, args: Args) -> dict[str, Any]:
        self._check_open()
        ns = args.namespace(session.namespaces)
        deadline_s = args.seconds("deadline_s")
        chain = await run_in_turns(chain_steps(ns, args.get("chain", (dict, type(None)), None), stores=True))
        put = await self._begin(
            self.core.put_steps(
                ns,
                chain,
                boundary=args.integer("boundary"),
                start=args.integer("start", 0),
                checkpoints=args.integers("checkpoints"),
                request=args.name("request", optional=True),
                deadline=self.core.clock() + deadline_s,
            )
        )
        return self._receive(
            session, put, deadline_s, layout=ns.layout, block_tokens=ns.block_tokens, progress=put.progress
        )

    async def _begin(self, steps: Steps[T]) -> T:
        """Begin a put in turns with everything else; it counts as in progress meanwhile."""
        self._puts += 1
        try:
            return await run_in_turns(steps)
        finally:
            self._puts -= 1

    async def _put_objects(self, session: Session, args: Args) -> dict[str, Any]:
        """Small objects come with the call; others in a transfer, and their checksums with it or in a call of their own before the seal."""
        self._check_open()
        keys, sizes = args.packed_keys(), args.numbers("sizes").tolist()
        data = args.get("data", (bytes, type(None)), None)
        sums = args.numbers("checksums").view(np.uint64).tolist() if data is not None or args.has("checksums") else None
        if len(keys) != len(sizes) or len(set(keys)) != len(keys) or min(sizes, default=0) < 0:
            raise ManifestError("put_objects: one size per key, none negative, and no key twice")
        if sums is not None and len(sums) != len(keys):
            raise ManifestError(f"put_objects: {len(sums)} checksums of {len(keys)} objects")
        if data is not None and len(data) != sum(sizes):
            raise ManifestError(f"put_objects: {len(data)} bytes of objects of {sum(sizes)} bytes")
        deadline_s = args.seconds("deadline_s")
        put = await self._begin(
            self.core.put_flat_steps(
                session.tenant, dict(zip(keys, sizes, strict=True)), deadline=self.core.clock() + deadline_s
            )
        )
        if sums is not None:
            put.checksums = dict(zip(keys, sums, strict=True))
        if data is None:
            return self._receive(session, put, deadline_s)
        try:
            self._fill(put, data)
            put.commit()
        finally:
            put.abort()
        return {}

    async def _checksums(self, session: Session, args: Args) -> dict[str, Any]:
        """Those of objects whose transfer has begun."""
        transfer, sums = args.name("transfer"), args.numbers("checksums").view(np.uint64).tolist()
        put = session.puts.get(transfer or b"")
        if put is None:
            raise ManifestError("checksums: no put of objects with this transfer is open on this link")
        if len(sums) != len(put.keys):
            raise ManifestError(f"checksums: {len(sums)} checksums of {len(put.keys)} objects")
        put.checksums = dict(zip(put.keys, sums, strict=True))
        return {}

    def _fill(self, put: FlatPut, data: bytes) -> None:
        """Small objects that came with the call."""
        at, body = 0, PageList.of(data)
        for key, pages in zip(put.keys, put.objects, strict=True):
            pages.copy_from(body.slice(at, at + pages.nbytes))
            at += pages.nbytes
            if pages.hash(0) != put.checksums[key]:
                raise IntegrityError(
                    f"object {key.hex()[:16]} does not have its checksum: put it again", retryable=True
                )
        self._wire["received_moved_bytes"] += len(data)
        self._wire["received_checksums_verified"] += len(put.keys)

    def _receive(
        self,
        session: Session,
        put: Put | FlatPut,
        deadline_s: float,
        *,
        layout: CacheLayout | None = None,
        block_tokens: int = 0,
        progress: Callable[[int, int, int, int], int] | None = None,
    ) -> dict[str, Any]:
        """Expect the transfer that fills ``put``; seal commits it, any other end aborts it."""
        transfer = new_transfer_id()
        promised = put.manifest(transfer)

        def grant(manifest: Manifest) -> Mapping[tuple[int, int], PageList]:
            if manifest.extents != promised.extents or manifest.fingerprint != promised.fingerprint:
                raise ManifestError("the manifest is not of the put that was asked for")
            return put.destinations

        def ranges(layer: int, tensor: int, start: int, stop: int) -> None:
            if progress is not None:
                progress(layer, tensor, start, stop)

        def seal() -> None:
            if isinstance(put, FlatPut) and len(put.checksums) != len(put.keys):
                raise ManifestError("the objects were sealed before their checksums were told")
            put.commit()

        since = time.perf_counter()  # uvloop's clock counts milliseconds

        def end(error: KVError | None) -> None:
            self._puts -= 1
            self._moved("put", since, error)
            put.on_failed = None
            session.puts.pop(transfer, None)
            for name in ("moved_bytes", "checksums_verified", "corrupt_chunks", "duplicate_bytes"):
                self._wire[f"received_{name}"] += getattr(receiver.stats, name)
            if error is not None:
                put.abort(error)

        try:
            receiver = self._endpoint.expect(
                transfer,
                Expectation(
                    grant,
                    layout=layout,
                    block_tokens=block_tokens,
                    # The core's deadline comes first; this one is for a core that was never asked.
                    deadline_s=deadline_s + 1.0,
                    window_bytes=self._window,
                    on_range=ranges,
                    on_seal=seal,
                    on_end=end,
                ),
                link=session.link,
            )
        except KVError as error:
            put.abort(error)
            raise
        self._puts += 1
        if isinstance(put, FlatPut):
            session.puts[transfer] = put
        # Stopping the receiver ends every write into the blocks; only then are they freed (in end).
        put.on_failed = receiver.fail
        return {"transfer": transfer}

    # -- gets ----------------------------------------------------------------------------------

    async def _get(self, session: Session, args: Args) -> dict[str, Any]:
        self._check_open()
        ns = args.namespace(session.namespaces)
        deadline_s = args.seconds("deadline_s")
        deadline = self.core.clock() + deadline_s
        request = args.name("request", optional=True)
        transfer = args.name("transfer")
        assert transfer is not None
        # All of it is read before anything is held.
        priority, bytes_per_s = args.priority(), args.rate("bytes_per_s")
        boundary, start = args.integer("boundary"), args.integer("start", 0)
        chain = await run_in_turns(chain_steps(ns, args.get("chain", (dict, type(None)), None)))
        while True:
            early = request is not None and not self.core.request_known(session.tenant, request)
            try:
                get = self.core.plan_get(
                    ns,
                    chain,
                    boundary=boundary,
                    start=start,
                    request=request,
                    deadline=deadline,
                )
                break
            except MissError:
                if request is None or not early:
                    raise
            await self._waiting.for_request(session.tenant, request, max(0.001, deadline - self.core.clock()))
        self._send(
            session,
            get,
            transfer,
            deadline - self.core.clock(),
            priority=priority,
            bytes_per_s=bytes_per_s,
        )
        if self.on_read is not None and chain is not None:
            self.on_read(ns, chain, boundary)
        return {}

    async def _get_objects(self, session: Session, args: Args) -> dict[str, Any]:
        self._check_open()
        transfer = args.name("transfer")
        assert transfer is not None
        deadline_s = args.seconds("deadline_s")
        get = self.core.plan_get_flat(session.tenant, args.packed_keys(), deadline=self.core.clock() + deadline_s)
        answer: dict[str, Any] = {
            "found": bits_to_wire(get.found),
            "sizes": get.sizes.tobytes(),
            "checksums": get.checksums.tobytes(),
        }
        total = get.nbytes
        if total <= min(args.integer("inline", 0), INLINE_BYTES):
            answer["data"] = b"".join(pages.tobytes() for pages in get.sources.values())
            self._wire["sent_moved_bytes"] += total
            get.close()
        else:
            self._send(session, get, transfer, deadline_s)
        return answer

    async def _locate(self, session: Session, args: Args) -> dict[str, Any]:
        """Where the bytes of a get lie, for a client that maps the memory; nothing is pinned."""
        self._check_lends()
        ns = args.namespace(session.namespaces)
        chain = await run_in_turns(chain_steps(ns, args.get("chain", dict)))
        get = self.core.plan_get(
            ns, chain, boundary=args.integer("boundary"), start=args.integer("start", 0), deadline=self.core.clock() + 1
        )
        places = [Located.of(self.core.arena, pages) for pages in get.sources.values()]
        slots = list(get.sources)
        get.close()
        return {"slots": slots, "places": pack_places(places)}

    async def _locate_objects(self, session: Session, args: Args) -> dict[str, Any]:
        self._check_lends()
        get = self.core.plan_get_flat(session.tenant, args.packed_keys(), deadline=self.core.clock() + 1)
        place, sizes, counts = get.place()
        checksums = get.checksums
        get.close()
        return {
            "checksums": checksums.tobytes(),
            "sizes": np.array(sizes, "<i8").tobytes(),
            "counts": np.array(counts, "<i8").tobytes(),
            "places": pack_places([place]),
        }

    def _check_lends(self) -> None:
        if self.only_tenant is None:
            raise RefusedError("this pool does not lend its memory to local clients: it has no local_socket")

    async def _drop_corrupt(self, session: Session, args: Args) -> dict[str, Any]:
        """A client found an object whose bytes no longer have their checksum."""
        return {"dropped": [self.core.drop_flat(session.tenant, key, corrupt=True) for key in args.packed_keys()]}

    def _send(
        self,
        session: Session,
        get: Get | FlatGet,
        transfer: bytes,
        deadline_s: float,
        *,
        priority: int = 0,
        bytes_per_s: float | None = None,
    ) -> None:
        pace = "" if bytes_per_s is None else f"get {transfer.hex()}"  # a name that nobody else has
        try:
            if pace:
                self._endpoint.cap_tenant(pace, bytes_per_s)
            sender = session.link.open(
                get.manifest(transfer), deadline_s=max(0.001, deadline_s), priority=priority, tenant=pace
            )
        except BaseException:
            if pace:
                self._endpoint.cap_tenant(pace, None)
            get.close()
            raise
        relay = self._spawn(self._relay(get, sender))
        if pace:
            relay.add_done_callback(lambda _: self._endpoint.cap_tenant(pace, None))

    async def _relay(self, get: Get | FlatGet, sender: Sender) -> None:
        """Hand over what is there and what still comes; seal when the source is sealed; then let go of it."""
        sealed: asyncio.Future[None] = self._loop.create_future()
        since = time.perf_counter()  # uvloop's clock counts milliseconds
        get.on_failed = sender.fail
        nbytes = sum(pages.nbytes for pages in get.sources.values())
        self.sending_bytes += nbytes
        below = sender.priority < 0
        if not below:
            self._below.live()

        def hand_over(layer: int, tensor: int, start: int, stop: int) -> None:
            if sender.error is None and stop > start:
                sender.hand_over(layer, tensor, start, get.sources[layer, tensor].slice(start, stop))

        def seal_seen() -> None:
            if not sealed.done():
                sealed.set_result(None)

        try:
            if isinstance(get, Get) and below and get.sealed:
                await self._below.hand_over(get, sender)
            elif isinstance(get, Get):
                get.on_sealed = seal_seen
                get.subscribe(hand_over)
                for item in get.ready_ranges():
                    hand_over(*item)
                if get.error is not None:
                    sender.fail(get.error)
                if not get.sealed:
                    await sender.first_of(sealed)
            else:
                for slot, pages in get.sources.items():
                    hand_over(*slot, 0, pages.nbytes)
            if sender.error is None:
                await sender.seal()
        except KVError:
            pass  # the consumer knows: it was told, or it is what went away
        finally:
            await sender.cancel("the pool stopped sending")
            self.sending_bytes -= nbytes
            if not below:
                self._below.done()
            self._moved("get", since, sender.error)
            for name in ("moved_bytes", "resent_bytes"):
                self._wire[f"sent_{name}"] += getattr(sender.stats, name)
            get.on_failed = None
            get.close()
