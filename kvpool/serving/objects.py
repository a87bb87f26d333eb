"""Verbs of flat objects. Small ones travel in the call or its answer, others in a transfer."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtransport.errors import ManifestError

from ..core import PoolCore
from ..flat import FlatRead
from ..local import pack_places
from ..messages import INLINE_BYTES, Args, bits_to_wire, numbers_to_wire
from .moving import Moving
from .sessions import Session, Sessions, Verb


class Objects:
    """Of one server."""

    def __init__(self, core: PoolCore, moving: Moving, sessions: Sessions) -> None:
        self._core = core
        self._moving = moving
        self._sessions = sessions

    @property
    def verbs(self) -> dict[str, Verb]:
        return {
            "exists": self._exists,
            "put_objects": self._put_objects,
            "checksums": self._checksums,
            "get_objects": self._get_objects,
            "locate_objects": self._locate_objects,
            "drop_corrupt": self._drop_corrupt,
        }

    async def _exists(self, session: Session, args: Args) -> dict[str, Any]:
        return {"found": self._core.exists_packed(session.tenant, args.get("keys", bytes), args.get("lengths", bytes))}

    async def _put_objects(self, session: Session, args: Args) -> dict[str, Any]:
        """Small objects come with the call; others in a transfer, and their checksums with it or in a call of their own before the seal."""
        self._moving.check_open()
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
        if data is not None:
            assert sums is not None
            await self._moving.begin(self._core.store_flat_steps(session.tenant, keys, sizes, sums, data))
            self._moving.wire["received_moved_bytes"] += len(data)
            self._moving.wire["received_checksums_verified"] += len(keys)
            return {}
        put = await self._moving.begin(
            self._core.put_flat_steps(
                session.tenant, dict(zip(keys, sizes, strict=True)), deadline=self._core.clock() + deadline_s
            )
        )
        if sums is not None:
            put.checksums = dict(zip(keys, sums, strict=True))
        return self._moving.receive(session, put, deadline_s)

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

    async def _get_objects(self, session: Session, args: Args) -> dict[str, Any]:
        self._moving.check_open()
        transfer = args.name("transfer")
        assert transfer is not None
        deadline_s = args.seconds("deadline_s")
        got = self._core.read_flat(
            session.tenant,
            args.packed_keys(),
            most=min(args.integer("inline", 0), INLINE_BYTES),
            deadline=self._core.clock() + deadline_s,
        )
        answer: dict[str, Any] = {
            "found": bits_to_wire(got.found),
            "sizes": numbers_to_wire(got.sizes),
            "checksums": numbers_to_wire(got.checksums),
        }
        if isinstance(got, FlatRead):
            answer["data"] = got.data
            self._moving.wire["sent_moved_bytes"] += len(got.data)
        else:
            self._moving.send(session, got, transfer, deadline_s)
        return answer

    async def _locate_objects(self, session: Session, args: Args) -> dict[str, Any]:
        """Where objects lie, for a client that maps the memory; nothing is pinned."""
        self._sessions.check_lends()
        get = self._core.plan_get_flat(session.tenant, args.packed_keys(), deadline=self._core.clock() + 1)
        place, sizes, counts = get.place()
        checksums = get.checksums
        get.close()
        return {
            "checksums": checksums.tobytes(),
            "sizes": np.array(sizes, "<i8").tobytes(),
            "counts": np.array(counts, "<i8").tobytes(),
            "places": pack_places([place]),
        }

    async def _drop_corrupt(self, session: Session, args: Args) -> dict[str, Any]:
        """A client found an object whose bytes no longer have their checksum."""
        return {"dropped": [self._core.drop_flat(session.tenant, key, corrupt=True) for key in args.packed_keys()]}
